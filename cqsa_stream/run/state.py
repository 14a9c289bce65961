"""What a later session of a run needs of those before it: state, not news. As JSON that carries its own checksum.

The same command makes the same bits until the user asks for something else: so the options as they were used, and the
plan that was chosen by them, are kept where the run is.
"""

from dataclasses import asdict, dataclass, field, replace

from cqsa_stream.machine.budgets import free_budgets
from cqsa_stream.machine.device import device_of
from cqsa_stream.options import Options
from cqsa_stream.problem import Problem
from cqsa_stream.run.manifest import sealed, unsealed
from cqsa_stream.schedulers.plan import Chosen

__all__ = ["State"]

_FORMAT = 1
_KEPT = ("device", "device_memory", "host_memory", "schedule", "kernel", "checkpoint_every_s")
_PLANNED_BY = ("device", "device_memory", "host_memory", "schedule", "kernel")  # another interval changes no bits


@dataclass(frozen=True)
class State:
    """The options as the last session used them, and what it chose by them; None of either: not known.

    ``rounded_tiles``: whether any session used a kernel that rounds its tiles to 16 bits, which ``verify`` allows for.
    """

    options: Options = field(default_factory=Options)
    chosen: Chosen | None = None
    rounded_tiles: bool = False

    @classmethod
    def unknown(cls, problem: Problem) -> "State":
        """Return the state of a run that has lost it: of 16-bit inputs, tiles may have been rounded."""
        return cls(rounded_tiles=problem.dtype not in ("float64", "float32"))

    def to_json(self) -> bytes:
        options = {name: getattr(self.options, name) for name in _KEPT}
        return sealed(_FORMAT, {**asdict(self), "options": options})

    @classmethod
    def from_json(cls, data: bytes) -> "State":
        """Raises ValueError where this is not what ``to_json`` wrote of a session."""
        fields = unsealed(_FORMAT, data)
        try:
            options, chosen = fields["options"], Chosen.from_dict(fields["chosen"])
            if set(options) != set(_KEPT) or type(options["device"]) is not str:
                raise ValueError(f"options {sorted(options)}")
            found = cls(Options(**options), chosen, fields["rounded_tiles"])
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a state ({type(error).__name__}: {error})") from error
        if type(found.rounded_tiles) is not bool:
            raise ValueError(f"rounded_tiles {found.rounded_tiles!r}")
        return found

    def inherited(self, options: Options) -> tuple[Options, tuple[Chosen, Options] | None]:
        """Return the options with what the user did not name; and, where nothing else is asked for than before, what
        was chosen, and the options it was chosen by.

        To plan anew, budgets that are not named are what they were, as far as that is free now; those of another device
        say nothing.
        """
        named = {name: value for name, value in asdict(options).items() if value is not None}
        had = {name: getattr(self.options, name) for name in _KEPT}
        if options.device is not None:
            named["device"] = str(device_of(options.device))
            if named["device"] != had["device"]:
                had = {name: had[name] for name in ("schedule", "checkpoint_every_s")}
        same = all(named.get(name, had.get(name)) == had.get(name) for name in _PLANNED_BY)
        before = replace(options, **{**had, **named})
        device = device_of(named.get("device") or had.get("device") or "auto")
        for name, free in zip(("device_memory", "host_memory"), free_budgets(device), strict=True):
            if free is not None and had.get(name) is not None:
                had[name] = min(had[name], free)
        kept = (self.chosen, before) if same and self.chosen is not None else None
        return replace(options, **{**had, **named}), kept
