"""Downloading the data set, from a local server."""

from __future__ import annotations

import errno
import functools
import hashlib
import http.client
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import OxfordIIITPet, utils

from petseg.cli import run
from petseg.data import Split, download, find, read_pair
from petseg_runtime.errors import DataError, OutputError

pytestmark = [
    # torchvision unpacks without naming a filter
    pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning"),
]


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Nothing."""


class Server:
    """Serves images.tar.gz and annotations.tar.gz from a folder, until `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.running = True

    def resources(self) -> tuple[tuple[str, str], ...]:
        """As in torchvision: URL and current MD5 of each archive."""
        return tuple(
            (
                f"http://127.0.0.1:{self.http.server_port}/{name}",
                hashlib.md5((self.folder / name).read_bytes()).hexdigest(),
            )
            for name in ("images.tar.gz", "annotations.tar.gz")
        )

    def stop(self) -> None:
        if self.running:
            self.http.shutdown()
            self.http.server_close()
            self.thread.join()
            self.running = False


@pytest.fixture(scope="module")
def archives(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives with the official layout and the photos of `oxford_root`."""
    folder = tmp_path_factory.mktemp("archives")
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        archive.add(oxford_root / "images", "images")
    with tarfile.open(folder / "annotations.tar.gz", "w:gz") as archive:
        archive.add(oxford_root / "annotations" / "trimaps", "annotations/trimaps")
        for name in ("trainval.txt", "test.txt"):  # the official lists have no header
            lines = (oxford_root / "annotations" / name).read_text().splitlines()
            text = "".join(f"{line}\n" for line in lines if not line.startswith("#")).encode()
            entry = tarfile.TarInfo(f"annotations/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return folder


@pytest.fixture
def server(archives: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    serving = Server(archives)
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", serving.resources())
    yield serving
    serving.stop()


def test_what_was_downloaded_is_found_and_read(server: Server, tmp_path: Path, oxford_root: Path) -> None:
    download(tmp_path)
    for split in Split:
        got, want = find(tmp_path, split), find(oxford_root, split)
        assert [pair.name for pair in got] == [pair.name for pair in want]
    for mine, original in zip(find(tmp_path, Split.TEST), find(oxford_root, Split.TEST), strict=True):
        for a, b in zip(read_pair(mine), read_pair(original), strict=True):
            assert (a == b).all()


def test_what_is_there_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    download(tmp_path)
    server.stop()
    download(tmp_path)


def test_an_incompletely_unpacked_archive_is_unpacked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: str, to: str, remove: bool = False) -> str:
        if "annotations" in source:
            (Path(to) / "annotations" / "trimaps").mkdir(parents=True)
            raise KeyboardInterrupt
        return unpack(source, to, remove)

    unpack = utils.extract_archive
    monkeypatch.setattr(utils, "extract_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path)
    monkeypatch.setattr(utils, "extract_archive", unpack)
    with pytest.raises(DataError, match="no data set here"):
        find(tmp_path, Split.TEST)
    server.stop()  # both archives have been downloaded
    download(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["oxford-iiit-pet"]
    assert len(find(tmp_path, Split.TEST)) == 6


def test_a_data_set_that_lacks_a_file_is_not_called_ready(server: Server, tmp_path: Path) -> None:
    download(tmp_path)
    gone = find(tmp_path, Split.TEST)[0].mask
    gone.unlink()
    with pytest.raises(
        DataError, match=rf"1 of the data set's files are missing, among them {gone.name}.* download again"
    ):
        download(tmp_path)


def test_a_full_disk_is_not_the_servers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", full)
    with pytest.raises(OutputError, match=r"cannot be written there \(No space left on device\)"):
        download(tmp_path)


def test_an_unofficial_file_is_rejected_and_a_second_try_fixes_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OxfordIIITPet._RESOURCES
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", (right[0], (right[1][0], "0" * 32)))
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        download(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError):
        find(tmp_path, Split.TEST)
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", right)
    download(tmp_path)
    assert len(find(tmp_path, Split.TEST)) == 6


def test_a_server_that_is_gone_is_a_data_error(server: Server, tmp_path: Path) -> None:
    server.stop()
    with pytest.raises(DataError, match="try again later"):
        download(tmp_path)


def test_an_archive_that_is_not_there_is_a_data_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (url, md5), second = OxfordIIITPet._RESOURCES
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", ((f"{url}.moved", md5), second))
    with pytest.raises(DataError, match="404"):
        download(tmp_path)


def test_a_connection_that_breaks_half_way_is_a_data_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Handler) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])

    monkeypatch.setattr(Handler, "do_GET", half)
    with pytest.raises(DataError, match="could not be downloaded"):
        download(tmp_path)


def test_the_command_says_where_the_data_set_is(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "download", str(tmp_path)]) == 0
    assert str(tmp_path / "oxford-iiit-pet") in capsys.readouterr().out
    assert run(["data", "check", str(tmp_path)]) == 0


def test_the_command_fails_with_the_code_of_bad_data(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.stop()
    assert run(["data", "download", str(tmp_path)]) == 8
    assert capsys.readouterr().err.startswith(f"petseg: {tmp_path}: ")


def test_a_server_that_does_not_speak_http_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def garbage(*args: object, **options: object) -> None:
        raise http.client.BadStatusLine("garbage")

    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", garbage)
    with pytest.raises(DataError, match="could not be downloaded"):
        download(tmp_path)
