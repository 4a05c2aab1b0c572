"""Where the repository lies, and the shared data that tests read where it is there."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
