"""Moving bytes: arrays to read and to write, and the durable store of partials. Knows nothing of attention."""
