"""The page of an export: its figures are the manifest's, its text is escaped, and a browser shows it offline."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.exports import run_command
from support.small_models import LLAMA, small_model
from support.torch_dist import write_torch_dist

from dist_export.export_report import NAME, render
from dist_export.report import format_bytes

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Text(HTMLParser):
    """The text of a page, and every address in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert tag != "script"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    model = small_model(LLAMA)
    write_torch_dist(folder / "iter_0000001", model.tensors, args=model.args)
    result = run_command("export", folder / "iter_0000001", folder / "out", "--tp", 2)
    assert result.returncode == 0, result.stderr
    return folder / "out"


def test_every_figure_is_the_manifests(exported: Path) -> None:
    page = Text((exported / NAME).read_text())
    manifest = json.loads((exported / "export_manifest.json").read_text())
    assert not page.links, "the page needs no other file"
    for name, file in manifest["files"].items():
        assert name in page.words and format_bytes(file["num_bytes"]) in page.words
        assert (exported / name).stat().st_size == file["num_bytes"]
    for process in manifest["run"]["processes"]:
        for key in ("bytes_needed", "bytes_read", "bytes_written", "peak_memory"):
            assert format_bytes(process[key]) in page.words
        assert f"{sum(process['seconds'].values()):.2f} s" in page.words
    for field in ("hidden_size", "num_layers"):
        assert str(manifest["model"][field]["value"]) in page.words
    assert f"trtllm-build --checkpoint_dir {exported}" in page.text
    assert manifest["run"]["finished"] in page.text and "trained as tp1 pp1" in page.text


def test_verification_is_shown_where_it_was_run(exported: Path, tmp_path: Path) -> None:
    checkpoint = exported.parent / "iter_0000001"
    verified = run_command("verify", checkpoint, exported, "--json")
    (tmp_path / "verified.json").write_text(verified.stdout)
    done = run_command(
        "report", exported, "--verification", tmp_path / "verified.json", "--html", tmp_path / "page.html"
    )
    assert done.returncode == 0, done.stderr
    page = Text((tmp_path / "page.html").read_text())
    assert "All levels passed." in page.words
    assert f"({json.loads(verified.stdout)['num_bytes_compared']} bytes)" in page.text
    assert "Verified: checksums, coverage, rebuild." in page.words
    unverified = Text((exported / NAME).read_text())
    assert "Not verified yet." in unverified.words
    assert f"dist-export verify {checkpoint} {exported}" in unverified.text
    again = run_command("verify", checkpoint, exported)
    assert again.returncode == 0 and "not part of this export" not in again.stdout


def test_text_of_the_checkpoint_is_escaped(exported: Path) -> None:
    manifest = json.loads((exported / "export_manifest.json").read_text())
    manifest["notes"] = ["<script>alert(1)</script>"]
    manifest["source"]["folder"] = "/data/<b>&"
    worst = {"snr_db": 1.5, "saturated": 0.25}
    report = {
        "scheme": "FP8",
        "tensors": {"layers.0.<i>.weight": worst, "layers.1.x.weight": {**worst, "snr_db": 30.0}},
    }
    page = render(manifest, quantization=report, verification={"faults": [{"where": "<u>", "what": "x"}]})
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page and "<u>" not in page
    text = Text(page).text
    for words in ("layers.0.<i>.weight", "25.0000 %", "<u>: x", "Verification failed: 1 fault. Do not serve this."):
        assert words in text


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    result = run_command("report", tmp_path)
    assert result.returncode == 2 and "export_manifest.json: No such file" in result.stderr
    (tmp_path / "export_manifest.json").write_text("{}")
    result = run_command("report", tmp_path)
    assert result.returncode == 2 and "it was not written by this release" in result.stderr


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium to look at the page with")
def test_a_browser_shows_it(exported: Path, tmp_path: Path) -> None:
    browser = next(path for each in BROWSERS if (path := shutil.which(each)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    page = (exported / NAME).as_uri()
    run = [browser, *options, f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000"]
    shown = subprocess.run([*run, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True)
    words = Text(shown.stdout.partition("<body>")[2]).words
    assert "Where the time went" in words and "rank0.safetensors" in words
    picture = tmp_path / "page.png"
    subprocess.run([*run, f"--screenshot={picture}", "--window-size=900,2000", page], capture_output=True, timeout=120)
    assert picture.stat().st_size > 20_000, "the picture is not blank"
