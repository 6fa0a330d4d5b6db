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


def run(compare: Any, tmp_path: Path, *given: dict[str, Any] | str) -> Result:
    """With records, the last of which is the new one, and options."""
    records = [value for value in given if isinstance(value, dict)]
    paths = [tmp_path / str(number) for number in range(len(records))]
    for path, value in zip(paths, records, strict=True):
        path.write_text(json.dumps(value))
    options = [value for value in given if isinstance(value, str)]
    return CliRunner().invoke(compare.compare, [*map(str, paths), *options])


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


def test_a_change_that_sessions_of_old_code_show_as_well_is_none(compare: Any, tmp_path: Path) -> None:
    quick, slow, new = record(1, 1), record(1.4, 2), record(1.35, 3)
    assert run(compare, tmp_path, quick, new).exit_code == 1
    done = run(compare, tmp_path, quick, slow, new)
    assert done.exit_code == 0, done.output
    assert run(compare, tmp_path, quick, slow, record(1.8, 3)).exit_code == 1
    faster = json.loads(run(compare, tmp_path, quick, slow, record(0.7, 3), "--json").stdout)["rows"]
    assert [row["verdict"] for row in faster] == ["faster", "faster", ""]


def test_of_a_few_times_nothing_is_said(compare: Any, tmp_path: Path) -> None:
    old, new = ({"rows": [{"name": "a", "seconds": values}]} for values in ([1.0, 1.01, 1.02], [3.0, 3.01, 3.02]))
    done = run(compare, tmp_path, old, new)
    assert done.exit_code == 0
    assert "fewer than 5 times  rows a seconds" in done.stdout


@pytest.mark.parametrize("key", ["photos", "clip", "threads"])
def test_records_of_different_work_are_refused(compare: Any, tmp_path: Path, key: str) -> None:
    done = run(compare, tmp_path, record(**{key: 300}), record(**{key: 240}))
    assert done.exit_code == 1
    assert f"of different work: {key}: 300 before, 240 now" in done.output


def test_a_table_of_results_is_no_other_work(compare: Any, tmp_path: Path) -> None:
    tables = ([{"curve": "a", "times_as_fast": [ratio]}] for ratio in (1.5, 1.6))
    assert run(compare, tmp_path, *(record(threads=table) for table in tables)).exit_code == 0


def test_another_model_is_said(compare: Any, tmp_path: Path) -> None:
    done = run(compare, tmp_path, record(shipped_model="edge, 1"), record(shipped_model="edge, 2"))
    assert done.exit_code == 0
    assert done.stderr == "shipped_model: edge, 1 before, edge, 2 now\n"


def test_what_is_gone_is_told_and_fails(compare: Any, tmp_path: Path) -> None:
    old, new = record(), record()
    del new["rows"][1]
    done = run(compare, tmp_path, old, new)
    assert done.exit_code == 1
    assert "gone  rows PyTorch milliseconds" in done.stdout
    assert run(compare, tmp_path, new, old).exit_code == 0


def test_a_file_that_is_no_record_is_named(compare: Any, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("[")
    done = CliRunner().invoke(compare.compare, [str(tmp_path / "bad"), str(tmp_path / "bad")])
    assert done.exit_code == 1
    assert "bad:" in done.output


@pytest.mark.skipif(not (ROOT / "benchmarks" / "results").is_dir(), reason="benchmarks/results is not in the sdist")
@pytest.mark.parametrize("name", ["latency", "throughput", "embedded-startup"])
def test_our_own_records_hold_times(compare: Any, name: str) -> None:
    saved = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    changes = compare.changes_of([saved], saved)
    assert changes
    assert all(change.ratio == 1 for change in changes)
    assert {change.verdict(0.05) for change in changes} <= {"", compare.TOO_FEW}
    assert len({change.what for change in changes}) == len(changes)
