"""Makes docs/images/report-light.png and report-dark.png: the top of a real run's report, for the READMEs.

    python -m tools.make_pictures                         trains the sample (a minute on a CPU), then takes the pictures
    python -m tools.make_pictures --run output/mrpc       takes those of a finished run

It needs chromium. The pictures are what a browser shows of report.html, with 128 colours at most.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bert_glue.errors import MachineError, exit_code_of, print_lines

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1280, 1290  # pixels: up to the confusion matrix
LARGEST = 200 * 1024  # bytes
_COLOURS = 128
_SCHEMES = {"light": 1, "dark": 0}  # blink's numbers
_FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


def chromium() -> str | None:
    """The browser's program; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def browse(words: list[str], seconds: float = 120.0) -> str:
    """Starts the browser in a fresh profile. Returns what it prints; it can reach no server.

    Args:
        words: further flags and the address of a page.
        seconds: the longest wait.

    Raises:
        MachineError: there is no browser, or it failed.
    """
    program = chromium()
    if program is None:
        raise MachineError("chromium is not installed", "Debian and Ubuntu: apt install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The sandbox refuses root; the page is our own file.
        call = [program, *_FLAGS, "--no-sandbox", f"--user-data-dir={profile}", *words]
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise MachineError(f"{program} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def take(page: Path, target: Path, scheme: str, *, width: int = WIDTH, height: int = HEIGHT) -> None:
    """A PNG of a page as it looks in a window of `width` x `height` pixels.

    Args:
        scheme: light or dark.
    """
    browse([
        f"--blink-settings=preferredColorScheme={_SCHEMES[scheme]}", f"--window-size={width},{height}",
        f"--screenshot={target}", page.resolve().as_uri(),
    ])  # fmt: skip


def make_pictures(run: Path, images: Path = IMAGES) -> list[str]:
    """Both pictures of a finished run's report, each below `LARGEST` bytes.

    Raises:
        MachineError: there is no browser or no report, or a picture is too large.
    """
    from PIL import Image

    if not (run / "report.html").is_file():
        raise MachineError(f"{run} has no report.html; python -m bert_glue.report {run} writes one")
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for scheme in _SCHEMES:
        target = images / f"report-{scheme}.png"
        take(run / "report.html", target, scheme)
        with Image.open(target) as picture:
            picture.convert("RGB").quantize(_COLOURS).save(target, optimize=True)
        size = target.stat().st_size
        if size > LARGEST:
            raise MachineError(f"{target} has {size:,} bytes; {LARGEST:,} are allowed")
        lines.append(f"wrote {target}: {size:,} bytes")
    return lines


def _train_sample(folder: Path) -> None:
    """The run of the READMEs' first command."""
    script = ROOT / "test" / "train_full_1p.sh"
    call = ["bash", str(script), "--TASK=mrpc", "--sample", f"--output_dir={folder}"]
    if subprocess.run(call, stdout=sys.stderr).returncode:
        raise MachineError("the run of the sample failed")


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 usage, 4 no browser, no report or a failed run."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_pictures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run; default: the sample is trained")
    args = parser.parse_args(argv)

    def make() -> int:
        if args.run:
            print_lines(*make_pictures(args.run))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            _train_sample(Path(folder) / "mrpc")
            print_lines(*make_pictures(Path(folder) / "mrpc"))
        return 0

    return exit_code_of(make)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
