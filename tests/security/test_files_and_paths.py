"""What is served, what is written, and where: nothing leaves the home, and nothing but the page's own files is read."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from serving import ROOT, Studio

from app import settings
from mole import runs
from mole.config import RunConfig, delete_preset, save_preset
from mole.core.errors import CheckpointError, DataError, ModelError, RunError
from mole.core.names import check_name
from mole.models import sources
from mole.preflight import job as preflight_job
from mole.runs.targets import locate

from .conftest import API, Stranger, everything_in

NAMES = [
    "", " ", ".", "..", "...", "../x", "..\\x", "a/../b", "a/b", "a\\b", "/etc/passwd", "//host/share", "C:x", "C:\\x",
    "\\\\?\\C:\\x", "~", "~root", "$HOME", "${HOME}", "`id`", "$(id)", "a;b", "a|b", "a&b", "-rf", "--help", "x\0",
    "x\n", "\nx", "x\r", "x\t", "x y", "x.", "x ", "con", "CON", "Con.txt", "nul", "aux.json", "com1", "LPT9.log",
    "prn", "x:stream", "x*", "x?", "<x>", '"x"', "x%2e%2e%2fy", "%2e%2e", "．．", "．．／x", "a／b", "a∕b", "a⁄b", "‥",
    "…", "x\u202etxt", "x\u200b", "x\ufeff", "x\u0435", "ｘ", "\u0301x", "\u0000", "𝒙", "x" * 65, "x" * 100_000,
    ".hidden", "..x",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:24])
def test_no_name_leads_out_of_its_folder(home: Path, name: str) -> None:
    """Runs, groups, presets and checks: the same rule for all, and nothing is written for a name it refuses."""
    with pytest.raises(RunError):
        check_name(name)
    for attempt in (
        lambda: runs.get(name),
        lambda: runs.create(RunConfig.from_dict({"name": name})),
        lambda: runs.create(RunConfig.from_dict({"name": "fine", "group": name})),
        lambda: save_preset(name, RunConfig()),
        lambda: delete_preset(name),
    ):
        with pytest.raises(RunError):
            attempt()
    assert preflight_job.find_job(name) is None
    assert not everything_in(home)


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "0", "_x", "x" * 64, "a..b"])
def test_ordinary_names_are_allowed_and_stay_inside(home: Path, name: str) -> None:
    path = runs.create(RunConfig.from_dict({"name": name})).path.resolve()
    assert path.parent == (home / "runs").resolve() and unicodedata.is_normalized("NFKC", path.name)


def test_a_link_among_the_runs_is_no_run(home: Path, tmp_path: Path) -> None:
    """Somebody's link to a folder elsewhere is neither shown, nor deleted through, nor trained in."""
    elsewhere = tmp_path / "elsewhere"
    made = runs.create(RunConfig.from_dict({"name": "made"}))
    shutil.copytree(made.path, elsewhere)
    (home / "runs" / "link").symlink_to(elsewhere, target_is_directory=True)
    assert [run.name for run in runs.list_runs()] == ["made"]
    with pytest.raises(RunError):
        runs.get("link")
    (made.path / "checkpoints").symlink_to(elsewhere, target_is_directory=True)
    runs.delete(made)
    assert (elsewhere / "run.yaml").is_file(), "what a link in a run leads to is not deleted with it"


def test_an_export_writes_where_it_was_told_and_nowhere_else(home: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    import zipfile

    from mole.core import checkpoint

    run = runs.create(RunConfig.from_dict({"name": "made"}))
    checkpoint.write_folder(
        run.adapter_dir, lambda aside: shutil.copytree(tiny_adapter, aside, dirs_exist_ok=True), step=1
    )
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(kept, target_is_directory=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for dest in (kept, kept / "mine.txt", tmp_path / "link", tmp_path / "dangling", tmp_path / "none" / "x", "/proc/x"):
        with pytest.raises((RunError, OSError)):
            runs.export(run, dest)
    assert everything_in(kept) == {"mine.txt": b"mine"}
    with zipfile.ZipFile(runs.export(run, tmp_path / "out.zip")) as archive:
        assert not [name for name in archive.namelist() if name.startswith(("/", "..")) or ".." in Path(name).parts]
    (run.adapter_dir / "secret").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="secret"):
        runs.export(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["a/..", "../a", "a/../../b", "owner/na/me", "./x", "a//b", "owner/..", "a/.", "~a/b"])
def test_a_hub_id_is_no_path(home: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for attempt in (
        lambda: sources.resolve(name),
        lambda: locate(name),
        lambda: locate(f"base:{name}") and sources.resolve(name),
    ):
        with pytest.raises((ModelError, RunError)):
            attempt()


# ---------------------------------------------------------------------------------------------------------
# Uploads


@pytest.mark.parametrize(
    "name", [*(n for n in NAMES if n and "\0" not in n and "/" not in n and len(n) < 200), "x" * 180]
)
def test_an_upload_is_kept_under_a_name_of_ours(home: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "in" / f"{name}.jsonl"
    source.parent.mkdir()
    source.write_text('{"text": "x"}')
    kept = settings.keep_upload(str(source))
    assert kept.parent == home / "uploads" and kept.suffix == ".jsonl" and kept.name.isascii() and len(kept.name) < 90
    assert not kept.name.startswith((".", "-")) or kept.name.strip("-.")
    assert [path.name for path in (home / "uploads").iterdir()] == [kept.name]


@pytest.mark.parametrize(
    "suffix", [".py", ".sh", ".html", ".svg", ".bin", ".safetensors", ".yaml", ".pkl", "", ".json.exe"]
)
def test_only_data_files_are_kept(home: Path, tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"x{suffix}"
    source.write_text("x")
    with pytest.raises(DataError, match="not a data file"):
        settings.keep_upload(str(source))
    assert not everything_in(home)


def temporary(studio: Studio) -> Path:
    """The studio's folder for uploads and downloads."""
    return (studio.home / "tmp" / f"gradio-{os.getuid()}").resolve()


UPLOAD_NAMES = [
    "../../x.jsonl", "..\\..\\x.jsonl", "/etc/x.jsonl", "a\0b.jsonl", "x" * 5000 + ".jsonl", ".bashrc", "",
    "．．／x.jsonl", "con.jsonl", "x\r\nSet-Cookie: a=b.jsonl", "<img src=x>.jsonl", "%2e%2e%2fx.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", UPLOAD_NAMES, ids=lambda name: ascii(name)[:24])
def test_a_file_sent_under_a_hostile_name(stranger: Stranger, name: str, tmp_path: Path) -> None:
    """Gradio puts it into a folder of its own; no part of its name is followed."""
    boundary = "XX"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + b'{"text": "x"}\r\n--' + boundary.encode() + b"--\r\n"
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = stranger.http.post(f"{API}/upload", content=body, headers=headers)
    assert answer.status_code in (200, 400, 413, 422) and "Traceback" not in answer.text
    for path in answer.json() if answer.status_code == 200 else ():
        assert Path(path).resolve().is_relative_to(temporary(stranger.studio)), path
    for place in (
        "/etc/x.jsonl",
        ROOT / "x.jsonl",
        ROOT.parent / "x.jsonl",
        stranger.studio.home / "x.jsonl",
        Path.home() / "x.jsonl",
    ):
        assert not Path(place).exists()


def test_a_file_that_was_never_uploaded_is_not_taken_for_one(stranger: Stranger, tmp_path: Path) -> None:
    """The path in an upload's message is checked: it must be one the server itself gave out."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"text": "swordfish"}')
    names = {part["id"]: part for part in stranger.config["components"]}
    wired = [entry for entry in stranger.endpoints if any(target[1] == "upload" for target in entry["targets"])]
    assert len(wired) >= 3
    for endpoint in wired:
        for path in (
            str(secret),
            "/etc/passwd",
            f"{stranger.studio.home}/studio.log",
            "http://127.0.0.1:1/x",
            "file:///etc/passwd",
        ):
            file = {"path": path, "url": path, "orig_name": "x.jsonl", "meta": {"_type": "gradio.FileData"}}
            data = [file if names[n]["type"] == "uploadbutton" else "" for n in endpoint["inputs"]]
            assert "error" in stranger.call(endpoint, data), (endpoint["id"], path)
    assert not (stranger.studio.home / "uploads").exists()


# ---------------------------------------------------------------------------------------------------------
# What is served


def test_no_file_is_served_but_the_page_s_own(shared_studio: Studio, stranger: Stranger) -> None:
    """Not the system's, the home's, the project's, nor those of the folder it was started in; in no spelling."""
    run = shared_studio.home / "runs-of-others" / "x"
    run.mkdir(parents=True)
    (run / "run.yaml").write_text("secret: swordfish")
    (shared_studio.home / ".env").write_text("secret: swordfish")
    wanted = [
        "/etc/passwd", "/proc/self/environ", str(run / "run.yaml"), str(shared_studio.home / ".env"),
        str(ROOT / "mole" / "cli" / "parser.py"), "README.md", "mole/py.typed", ".git", ".git/HEAD", "pyproject.toml",
    ]  # fmt: skip
    spellings = []
    for path in wanted:
        up = "../" * 12 + path.lstrip("/")
        spellings += [
            path, up, f"{temporary(shared_studio)}/{up}", f"{temporary(shared_studio)}/../..{path}",
            "/" + path, f"{path}/", f"file://{path}", path.replace("e", "%65"),
            path.replace("/", "%5c"), path + "%00.png", path.upper(), f"./{path}", up.replace("../", "..%2f"),
            up.replace("../", "%2e%2e/"), up.replace("../", "....//"), quote(quote(up)),
        ]  # fmt: skip
    routes = [
        "/gradio_api/file={}", "/file={}", "/gradio_api/file/{}", "/static/{}", "/assets/{}", "/svelte/{}",
        "/gradio_api/custom_component/x/client/component/{}", "/{}",
    ]  # fmt: skip
    inside = ("root:x:0", "swordfish", "import argparse", "MOLE_HOME=", "short_description:", "[project]", "ref: refs/")
    for route in routes:
        for path in spellings:
            request = httpx.Request("GET", shared_studio.url + "/")
            request.url = request.url.copy_with(raw_path=route.format(path).encode())
            text = stranger.http.send(request).text
            assert not [part for part in inside if part in text], (route, path, text[:200])


def test_a_served_export_is_the_run_s_and_goes_as_a_download(shared_studio: Studio, stranger: Stranger) -> None:
    """Files in Gradio's own folder may be fetched by whoever knows their long random names; never as a page."""
    answer = stranger.http.post(f"{API}/upload", files={"files": ("x.html", b"<script>alert(1)</script>", "text/html")})
    (path,) = answer.json()
    got = stranger.http.get(f"{API}/file={path}")
    assert got.headers["content-disposition"].startswith("attachment") and "html" not in got.headers["content-type"]
    assert got.headers["x-content-type-options"] == "nosniff"
    assert len(Path(path).parent.name) >= 32, "not to be guessed"


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:{port}/config", "http://169.254.169.254/", "http://[::1]:{port}/", "http://localhost:{port}/"],
)
def test_the_studio_fetches_no_address_of_the_machine_s_own_network(stranger: Stranger, address: str) -> None:
    port = stranger.studio.url.rpartition(":")[2]
    for route in (f"{API}/file=", f"{API}/proxy="):
        answer = stranger.http.get(route + address.format(port=port))
        assert answer.status_code in (400, 403, 502) and "dependencies" not in answer.text
