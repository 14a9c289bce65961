"""Names of arrays: which file or URL each means, and that none carries secrets."""

import logging
import os
import traceback
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import zarr

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.readers.locations import kvstore, local_name, redacted, without_secrets
from cqsa_stream.storage.readers.plain import RawArray
from cqsa_stream.storage.readers.tensorstore import context
from tests.servers import http_server
from tests.test_arrays import by_zarr, numbers, plain, read
from tests.test_handles import ALL, values_of

ODD = os.fsdecode(b"\xff")


def test_names_that_are_not_utf8_are_read_or_refused(tmp_path: Path) -> None:
    folder, values = tmp_path / ODD, numbers("float32")
    folder.mkdir()
    np.save(folder / "a.npy", values)
    for source in (folder / "a.npy", str(folder / "a.npy"), plain(folder, values)):
        assert values_of(source).tobytes() == values.tobytes()
    raw = by_zarr(compressors=None)(folder, values)
    assert isinstance(open_array(raw), RawArray)
    assert values_of(zarr.open_array(raw)).tobytes() == values.tobytes()
    with pytest.raises(ArrayError, match=r"not UTF-8.*rename it"):
        open_array(raw, layout="bthd")
    for name in (f"https://{ODD}/x", f"{tmp_path}/{ODD}.zip"):
        Path(tmp_path / f"{ODD}.zip").touch()
        with pytest.raises(ArrayError, match=r"not UTF-8.*rename it"):
            open_array(name)


class InFolder:
    """A path that is none of pathlib's."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __fspath__(self) -> Any:
        return self.path


def test_any_path_is_a_source(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers("float32"))
    name = str(tmp_path / "a.npy")
    with os.scandir(tmp_path) as entries:
        entry = next(entries)
    for source in (PurePath(name), InFolder(name), InFolder(os.fsencode(name)), entry):
        assert open_array(source).source == name


def test_file_urls_name_local_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers("float32"))
    source = plain(tmp_path, numbers("float32"))
    for prefix in ("", "file://", "file://localhost"):
        assert open_array(f"{prefix}{tmp_path}/a.npy").source == f"{tmp_path}/a.npy"
        assert open_array(f"{prefix}{source}").source == source
    for refused in ("file://host/a.npy", "file://a.npy"):
        with pytest.raises(ArrayError, match=r"of the host.*expected file:///path"):
            open_array(refused)
    assert local_name("file:///a.zip|zip:b/") == "file:///a.zip|zip:b/"


def test_a_tilde_is_the_home_where_no_file_has_this_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    np.save(home / "a.npy", numbers("float32"))
    part = plain(home, numbers("float32")).removeprefix(str(home))
    assert open_array("~/a.npy").source == open_array(Path("~/a.npy")).source == f"{home}/a.npy"
    assert open_array(f"~{part}").source == f"{home}{part}"
    (here / "~").mkdir()
    np.save(here / "~/a.npy", numbers("float32"))
    assert open_array("~/a.npy").source == f"{here}/~/a.npy"
    with pytest.raises(ArrayError, match=r"no such file"):
        open_array("~nobody-of-this-name/a.npy")


def test_names_with_signs_of_urls_are_local(tmp_path: Path) -> None:
    for name in ("a@b.npy", "a?b=c.npy", "a#b.npy", "a::b.npy"):
        np.save(tmp_path / name, numbers("float32"))
        for source in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
            assert open_array(source).source == f"{tmp_path}/{name}"
    folder = tmp_path / "c::d"
    folder.mkdir()
    source = plain(folder, numbers("float32"))
    assert open_array(source).source == open_array(f"file://{source}").source == source


URLS = {
    "https://user:pw@host/x.zarr": "https://host/x.zarr",
    "https://user@host:80/x": "https://host:80/x",
    "http://user:pw@[::1]:80/x": "http://[::1]:80/x",
    "https://a@b:pw@host/x": "https://host/x",
    "https://user:a::b@host/x": "https://host/x",
    "https://user:p/w?1@host/x": "https://host/x",
    "https://user:pw@host": "https://host",
    "HTTPS://user:pw@host/x": "HTTPS://host/x",
    "s3://key:pw@bucket/x": "s3://bucket/x",
    "https://host/x?X-Amz-Signature=pw#part": "https://host/x?",
    "https://host?token=pw": "https://host?",
    "zip://inside::https://user:pw@host/x.zip?sig=pw": "zip://inside::https://host/x.zip?",
    "simplecache::https://user:pw@host/x": "simplecache::https://host/x",
    "https://user:pw@host/x.zip|zip:inside/": "https://host/x.zip|zip:inside/",
    "https://host/x.zip?sig=pw|zip:in@side/|zarr3:": "https://host/x.zip?|zip:in@side/|zarr3:",
}


@pytest.mark.parametrize("url", URLS)
def test_secrets_are_dropped(url: str) -> None:
    assert without_secrets(url) == URLS[url]
    assert without_secrets(URLS[url]) == URLS[url]
    assert redacted(f'reading "{url}": failed') in (f'reading "{URLS[url]}": failed', f'reading "{URLS[url]} failed')
    with pytest.raises(ArrayError) as refused:
        open_array(url.replace("http", "ftp").replace("HTTP", "ftp").replace("s3:", "ftp:"))
    assert "pw" not in str(refused.value)
    assert "user" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["/a/b@c?d#e", "a@b", "a::b@c", "c:/x@y?z", "file:///a@b?c", "memory://a@b/", "zip://a@b?c::file:///x@y?z",
     "https://host/a@b", "https://host:80/a:b@c", "http://[::1]:80/x", "https://host/x#part", "s3://bucket/x", ""],
)  # fmt: skip
def test_what_has_no_secrets_stays(name: str) -> None:
    assert without_secrets(name) == name
    assert redacted(name) == name


def test_a_query_stands_behind_the_file_of_an_archive() -> None:
    assert kvstore("zip://in::https://host/x.zip?sig=1") == "https://host/x.zip?sig=1|zip:in/"
    assert kvstore("https://host/x.zarr?sig=1") == "https://host/x.zarr/?sig=1"


def test_a_name_too_long_for_a_file_is_none(tmp_path: Path) -> None:
    for part in ("", "#float32:2,3,100,8"):
        with pytest.raises(ArrayError, match="no such file"):
            open_array(f"{tmp_path}/{'a' * 300}{part}")


LONG = "x" * 2000  # as what S3 signs is


@pytest.mark.parametrize(
    "url", ["http://user:pw@{}/a.zarr", "http://{}/a.zarr?token=pw", f"http://{{}}/a.zarr?a={LONG}&token=pw"]
)
def test_a_url_is_read_with_its_secrets_which_nobody_sees(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}
    monkeypatch.setattr("cqsa_stream.storage.readers.tensorstore._RETRIES", at_once)
    path, values = by_zarr()(tmp_path, numbers("float32")), numbers("float32")
    with http_server() as root:
        source = url.format(f"{root.removeprefix('http://')}{tmp_path}")
        with caplog.at_level(logging.WARNING):
            array = open_array(source)
        assert [record.message.partition(": ")[2].split(";")[0] for record in caplog.records] == [
            "the credentials in the URL are not kept"
        ]
        store = ts.open({"driver": "zarr3", "kvstore": kvstore(source)}, context=context(), read=True).result()
        assert open_array(store).source == "memory"
        assert array.source == without_secrets(source)
        assert read(array, 0, *ALL).tobytes() == values[0].tobytes()
        (path / "c/0/0/0/0").write_bytes(b"damaged")
        with pytest.raises(ArrayError, match=r"a\.zarr") as damaged:
            read(array, 0, *ALL)
        with pytest.raises(ArrayError, match=r"none\.zarr") as missing:
            open_array(source.replace("a.zarr", "none.zarr"))
    with pytest.raises(ArrayError, match="connect") as unreachable:
        open_array(source)
    with pytest.raises(ArrayError, match="connect") as handle:
        read(open_array(store), 0, *ALL)
    for raised in (damaged, missing, unreachable, handle):
        assert "pw" not in "".join(traceback.format_exception_only(raised.value))
        assert "pw@" not in (shown := "".join(traceback.format_exception(raised.value)))
        assert "token=pw" not in shown
    assert "pw" not in caplog.text
