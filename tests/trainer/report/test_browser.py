"""The pages in a browser, from disk: no console errors, no sideways scrolling, nothing live."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from widemargin.trainer.monitor.margins import BINS, MARGINS_FILE, line_of
from widemargin.trainer.report.write import write_report

from tests.trainer.report.test_report import HOSTILE, history, make_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PROBE = """<script>addEventListener('load', () => {
const root = document.documentElement, paper = getComputedStyle(document.body).backgroundColor
parent.postMessage([innerWidth, root.scrollWidth, paper].join('|'), '*') })</script></body>"""
FRAME = """<!doctype html><script>addEventListener('message', (said) =>
document.documentElement.setAttribute('data-seen', said.data))</script>
<iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>"""
DARK, LIGHT = "rgb(19, 21, 25)", "rgb(251, 250, 248)"


def browse(path: Path, home: Path, *flags: str) -> tuple[list[str], str]:
    """What the browser says on its console, and the page after loading."""
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    where = ("--enable-logging=stderr", f"--user-data-dir={home}", "--window-size=1500,1000")
    command = [str(CHROMIUM), *quiet, *where, *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


def framed(path: Path, width: int) -> Path:
    """A page with ``path`` in a frame of this width: a window itself is never so narrow."""
    frame = path.with_name(f"frame-{path.name}")
    frame.write_text(FRAME.format(page=path.as_uri(), width=width), encoding="utf-8")
    return frame


def pages(folder: Path) -> list[Path]:
    folders = []
    for i in range(2):
        run_dir = make_run(
            folder / f"r{i}",
            history(),
            settings={"run_name": f"run {i}", "seed": i, "beta": i},
            objective={"name": "lmpo", HOSTILE: "a" * 300},
            data={"train": {"x" * 200: HOSTILE}},
        )
        rows = [
            {"step": s, "prompt": HOSTILE, "answer": HOSTILE * 5, "tokens": 9} for s in range(9)
        ]
        (run_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts = [1] * BINS
        lines = [line_of(s, {"reward_margins": counts, "target_margins": counts}) for s in (0, 40)]
        (run_dir / MARGINS_FILE).write_text("".join(lines))
        folders.append(run_dir)
    return [write_report(folders[0]), write_report(folders)]


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_pages_load_without_a_word_on_the_console(tmp_path: Path, width: int, colours: str) -> None:
    flags = ["--force-dark-mode"] if colours == "dark" else []
    for i, path in enumerate(pages(tmp_path)):
        home = tmp_path / f"home{i}"
        said, _ = browse(framed(path, width), home, *flags)
        assert said == []
        # The same page with a probe in it, which its own policy would not let run.
        content = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
        probed = tmp_path / f"probed{i}.html"
        probed.write_text(content.replace("</body>", PROBE), encoding="utf-8")
        _, dom = browse(framed(probed, width), home, *flags)
        seen = re.search(r'data-seen="(\d+)\|(\d+)\|([^"]*)"', dom)
        assert seen is not None
        assert int(seen[1]) == width
        assert int(seen[2]) <= width, "the page scrolls sideways"
        assert seen[3] == (DARK if colours == "dark" else LIGHT)


def test_what_models_write_is_shown_as_text(tmp_path: Path) -> None:
    for i, path in enumerate(pages(tmp_path)):
        said, dom = browse(path, tmp_path / f"home{i}")
        assert said == []
        assert "&lt;script&gt;alert" in dom
        assert "<script" not in dom
        assert "<img" not in dom


def test_the_console_would_be_heard_and_the_policy_stops_scripts(tmp_path: Path) -> None:
    (path,) = pages(tmp_path)[:1]
    live = path.read_text(encoding="utf-8").replace("</body>", PROBE)
    path.write_text(live, encoding="utf-8")
    said, dom = browse(framed(path, 1400), tmp_path / "home")
    assert len(said) == 1
    assert "Content Security Policy" in said[0]
    assert 'data-seen="' not in dom
