"""What is slower is said, what is noise is not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.compare")


def record(scale: float = 1.0, seed: int = 0, noise: float = 0.1, **values: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    times = {kind: (scale * (1 + noise * rng.random(20))).tolist() for kind in ("command", "loop")}
    return {
        "machine": {"cpu": "EPYC"},
        "versions": {"numpy": "2.4"},
        "rows": [
            {"backend": "openvino", "kind": "mask", "seconds": times, "sizes": [1, 2, 3]},
            {"name": "PyTorch", "milliseconds": (5 * rng.random(20) + 10).tolist(), "median": 12.0},
        ],
        **values,
    }


def run(compare: Any, tmp_path: Path, old: dict[str, Any], new: dict[str, Any], *options: str) -> Result:
    for name, value in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(value))
    return CliRunner().invoke(compare.compare, [str(tmp_path / "old"), str(tmp_path / "new"), *options])


def test_the_same_code_twice_shows_no_change(compare: Any, tmp_path: Path) -> None:
    done = run(compare, tmp_path, record(seed=1), record(seed=2))
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "slower" not in done.stdout
    assert [line.split(maxsplit=4)[-1] for line in done.stdout.splitlines()] == [
        "rows openvino mask seconds command",
        "rows openvino mask seconds loop",
        "rows PyTorch milliseconds",
    ]


@pytest.mark.parametrize(("scale", "verdict"), [(1.3, "slower"), (0.7, "faster"), (1.02, "")])
def test_what_changed_beyond_the_noise_is_named(compare: Any, tmp_path: Path, scale: float, verdict: str) -> None:
    done = run(compare, tmp_path, record(seed=1), record(scale, seed=2), "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["verdict"] for row in rows] == [verdict, verdict, ""]
    assert rows[0]["ratio"] == pytest.approx(scale, rel=0.05)
    assert rows[0]["low"] <= rows[0]["ratio"] <= rows[0]["high"]
    assert done.exit_code == (verdict == "slower")


def test_noise_widens_the_interval(compare: Any, tmp_path: Path) -> None:
    quiet, noisy = (
        json.loads(run(compare, tmp_path, record(1, 1, noise), record(1.15, 2, noise), "--json").stdout)["rows"][0]
        for noise in (0.01, 1.5)
    )
    assert quiet["verdict"] == "slower"
    assert noisy["verdict"] == ""


def test_another_machine_is_said(compare: Any, tmp_path: Path) -> None:
    done = run(compare, tmp_path, record(), record(machine={"cpu": "Xeon"}))
    assert done.stderr == "machine cpu: EPYC before, Xeon now\n"


def test_records_without_a_time_in_common_are_refused(compare: Any, tmp_path: Path) -> None:
    done = run(compare, tmp_path, record(), {"rows": []})
    assert done.exit_code == 1
    assert "no times in common" in str(done.output) + str(done.exception)


@pytest.mark.skipif(not (ROOT / "benchmarks" / "results").is_dir(), reason="benchmarks/results is not in the sdist")
@pytest.mark.parametrize("name", ["latency", "throughput", "embedded-startup"])
def test_our_own_records_hold_times(compare: Any, name: str) -> None:
    saved = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    changes = compare.changes_of(saved, saved)
    assert changes
    assert all(change.verdict(0.05) == "" and change.ratio == 1 for change in changes)
    assert len({change.what for change in changes}) == len(changes)
