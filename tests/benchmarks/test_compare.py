"""What became slower is reported; noise is not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks import compare

ROOT = Path(__file__).resolve().parents[2]


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


def run(tmp_path: Path, *given: dict[str, Any] | str) -> Result:
    """Run `compare` with records, of which the last is NEW, and options."""
    records = [value for value in given if isinstance(value, dict)]
    paths = [tmp_path / str(number) for number in range(len(records))]
    for path, value in zip(paths, records, strict=True):
        path.write_text(json.dumps(value))
    options = [value for value in given if isinstance(value, str)]
    return CliRunner().invoke(compare.compare, [*map(str, paths), *options])


def test_the_same_code_twice_shows_no_change(tmp_path: Path) -> None:
    done = run(tmp_path, record(seed=1), record(seed=2))
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "slower" not in done.stdout
    assert [line.split(maxsplit=4)[-1] for line in done.stdout.splitlines()] == [
        "rows openvino mask seconds command",
        "rows openvino mask seconds loop",
        "rows PyTorch milliseconds",
    ]


@pytest.mark.parametrize(("scale", "verdict"), [(1.3, "slower"), (0.7, "faster"), (1.02, "")])
def test_a_change_beyond_the_noise_is_reported(tmp_path: Path, scale: float, verdict: str) -> None:
    done = run(tmp_path, record(seed=1), record(scale, seed=2), "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["verdict"] for row in rows] == [verdict, verdict, ""]
    assert rows[0]["ratio"] == pytest.approx(scale, rel=0.05)
    assert rows[0]["low"] <= rows[0]["ratio"] <= rows[0]["high"]
    assert done.exit_code == (verdict == "slower")


def test_noise_widens_the_interval(tmp_path: Path) -> None:
    quiet, noisy = (
        json.loads(run(tmp_path, record(1, 1, noise), record(1.15, 2, noise), "--json").stdout)["rows"][0]
        for noise in (0.01, 1.5)
    )
    assert quiet["verdict"] == "slower"
    assert noisy["verdict"] == ""


def test_a_different_machine_is_reported(tmp_path: Path) -> None:
    done = run(tmp_path, record(), record(machine={"cpu": "Xeon"}))
    assert done.stderr == "machine cpu: EPYC before, Xeon now\n"


def test_records_without_a_time_in_common_are_rejected(tmp_path: Path) -> None:
    done = run(tmp_path, record(), {"rows": []})
    assert done.exit_code == 1
    assert "no times in common" in str(done.output) + str(done.exception)


def test_a_change_within_the_spread_of_the_old_sessions_is_not_reported(tmp_path: Path) -> None:
    quick, slow, new = record(1, 1), record(1.4, 2), record(1.35, 3)
    assert run(tmp_path, quick, new).exit_code == 1
    done = run(tmp_path, quick, slow, new)
    assert done.exit_code == 0, done.output
    assert run(tmp_path, quick, slow, record(1.8, 3)).exit_code == 1
    faster = json.loads(run(tmp_path, quick, slow, record(0.7, 3), "--json").stdout)["rows"]
    assert [row["verdict"] for row in faster] == ["faster", "faster", ""]


def test_too_few_measurements_get_no_verdict(tmp_path: Path) -> None:
    old, new = ({"rows": [{"name": "a", "seconds": values}]} for values in ([1.0, 1.01, 1.02], [3.0, 3.01, 3.02]))
    done = run(tmp_path, old, new)
    assert done.exit_code == 0
    assert "fewer than 5 times  rows a seconds" in done.stdout


@pytest.mark.parametrize("key", ["photos", "clip", "threads"])
def test_records_of_different_workloads_are_not_compared(tmp_path: Path, key: str) -> None:
    done = run(tmp_path, record(**{key: 300}), record(**{key: 240}))
    assert done.exit_code == 1
    assert f"of different work: {key}: 300 before, 240 now" in done.output


def test_different_result_tables_do_not_count_as_different_workloads(tmp_path: Path) -> None:
    tables = ([{"curve": "a", "times_as_fast": [ratio]}] for ratio in (1.5, 1.6))
    assert run(tmp_path, *(record(threads=table) for table in tables)).exit_code == 0


def test_a_different_model_is_reported(tmp_path: Path) -> None:
    done = run(tmp_path, record(shipped_model="edge, 1"), record(shipped_model="edge, 2"))
    assert done.exit_code == 0
    assert done.stderr == "shipped_model: edge, 1 before, edge, 2 now\n"


@pytest.mark.parametrize("turned", [False, True])
def test_a_folder_is_not_compared_with_a_record(tmp_path: Path, turned: bool) -> None:
    (tmp_path / "old").mkdir()
    for place in ("old/latency.json", "new.json"):
        (tmp_path / place).write_text(json.dumps({"seconds": [1.0] * 5}))
    paths = [str(tmp_path / "old"), str(tmp_path / "new.json")]
    done = CliRunner().invoke(compare.compare, paths[::-1] if turned else paths)
    assert (done.exit_code, f"{paths[0]} is a folder, {paths[1]} a record" in done.output) == (1, True)


def test_a_missing_time_is_reported_and_fails(tmp_path: Path) -> None:
    old, new = record(), record()
    del new["rows"][1]
    done = run(tmp_path, old, new)
    assert done.exit_code == 1
    assert "gone  rows PyTorch milliseconds" in done.stdout
    assert run(tmp_path, new, old).exit_code == 0


def test_a_file_that_is_not_a_record_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("[")
    done = CliRunner().invoke(compare.compare, [str(tmp_path / "bad"), str(tmp_path / "bad")])
    assert done.exit_code == 1
    assert "bad:" in done.output


@pytest.mark.skipif(not (ROOT / "benchmarks" / "results").is_dir(), reason="benchmarks/results is not in the sdist")
@pytest.mark.parametrize("name", ["latency", "throughput", "peers"])
def test_only_regressions_are_reported_for_the_projects_records(name: str) -> None:
    saved = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    slowed = copy.deepcopy(saved)
    lists = dict(compare.times_in(slowed))
    enough = {what for what, times in lists.items() if len(times) >= compare.FEWEST}
    slower = min(enough or lists, key=lambda what: max(lists[what]) / min(lists[what]))  # noise hides it in others
    lists[slower][:] = [1.3 * ms for ms in lists[slower]]
    changes = compare.changes_of([saved], slowed)
    assert {change.what: change.ratio for change in changes} == {
        what: pytest.approx(1.3 if what == slower else 1) for what in lists
    }
    verdicts = {change.what: change.verdict(0.05) for change in changes}
    assert verdicts == {
        what: compare.TOO_FEW if what not in enough else "slower" if what == slower else "" for what in lists
    }
    assert len(verdicts) == len(changes)


def test_five_measurements_rarely_give_a_false_regression() -> None:
    """At most 4 % if nothing changed, with a tolerance of 0; by the interval itself it would be 2.5 %."""
    rng = np.random.default_rng(0)

    def slower(scale: float, draws: int = 400) -> float:
        verdicts = []
        for _ in range(draws):
            old, new = (np.exp(0.2 * rng.standard_normal((2, compare.FEWEST))) * [[1], [scale]]).tolist()
            verdicts.append(compare.change_of("a", [old], new, rng).verdict(0))
        return verdicts.count("slower") / draws

    assert slower(1.0) <= 0.04
    assert slower(2.0) >= 0.9


@pytest.mark.parametrize(("now", "told"), [(80.0, "20 % slower"), (125.0, "25 % faster"), (91.0, ""), (110.0, "")])
def test_a_slower_machine_is_reported(tmp_path: Path, now: float, told: str) -> None:
    old, new = (record(machine={"cpu": "EPYC", "calibration": {"gflops": speed}}) for speed in (100.0, now))
    done = run(tmp_path, old, new)
    assert done.exit_code == 0
    assert done.stderr == (f"the machine itself is {told}: 100 GFLOP/s before, {now:.0f} now\n" if told else ""), (
        "a calibration is never twice the same: that alone is not said"
    )
    assert run(tmp_path, record(), new).stderr == "", "an older record has none"


def test_other_cpu_instructions_are_reported(tmp_path: Path) -> None:
    old, new = (
        record(machine={"cpu": "EPYC", "processor": {"family": "25", "instructions": list(flags)}})
        for flags in (("avx2",), ("avx2", "avx512f"))
    )
    said = run(tmp_path, old, new).stderr
    assert said == "machine processor instructions: ['avx2'] before, ['avx2', 'avx512f'] now\n"


def side_by_side(ratio: float) -> dict[str, Any]:
    """A record with ratios in every form that occurs; one is 1 because it is the reference."""
    table = {"once_running": {"median": 2.0, "min": ratio, "max": 9 * ratio}, "startup": None}
    rows = [
        {"name": "PyTorch", "times_faster_than_pytorch": 1.0, "median": 5.0},
        {"name": "openvino", "times_faster_than_pytorch": 3 * ratio, "share_of_matmul_peak": None},
        {"name": "peer", "petseg_times_as_fast": table},
    ]
    return {"rows": rows, "threads": [{"curve": "size", "times_as_fast_as_one_thread": [1.5, 1.6]}]}


def test_ratios_measured_side_by_side_are_counted_separately(tmp_path: Path) -> None:
    old, new = (record(**side_by_side(ratio)) for ratio in (1.0, 1.2))
    done = run(tmp_path, old, new)
    assert done.exit_code == 0, "no time changed"
    assert done.stderr == ""
    *rows, ratios, unknown = done.stdout.splitlines()
    row = "rows openvino times_faster_than_pytorch"
    assert [line for line in rows if "side by side" in line] == [f" 1.200  side by side: 3 before, 3.6 now  {row}"]
    told = "ratios that were measured side by side: 3 of 4 within 10 % of each other; the worst:"
    assert ratios == f"{told} 1.200, {row}"
    assert unknown == "4 of 4 figures could not be judged: fewer than 5 times, or no values of single rounds"
    found = json.loads(run(tmp_path, old, new, "--json").stdout)
    assert {ratio["what"]: (ratio["old"], ratio["new"]) for ratio in found["ratios"]} == {
        row: (3.0, pytest.approx(3.6)),
        "rows peer petseg_times_as_fast once_running median": (2.0, 2.0),
        "threads size times_as_fast_as_one_thread 1": (1.5, 1.5),
        "threads size times_as_fast_as_one_thread 2": (1.6, 1.6),
    }
    assert found["summary"]["ratios"] == {
        "within": 0.1,
        "alike": 3,
        "of": 4,
        "worst": {"what": row, "ratio": pytest.approx(1.2)},
        "not_judged": 4,
    }


def with_rounds(scale: float) -> dict[str, Any]:
    """A record with the rounds of a ratio, in both forms that occur."""
    each = [scale * ratio for ratio in (1.98, 2.0, 2.01, 2.02, 1.99)]
    table = {"median": 2 * scale, "min": min(each), "max": max(each), "each": each}
    rows = [
        {"name": "loop", "ratio_to_loop": 2 * scale, "ratio_to_loop_each": each},
        {"name": "peer", "petseg_times_as_fast": {"once_running": table}},
    ]
    return record(rows=rows)


@pytest.mark.parametrize(("scale", "verdict"), [(0.8, "lost"), (0.97, ""), (1.3, "")])
def test_losing_a_lead_fails(tmp_path: Path, scale: float, verdict: str) -> None:
    done = run(tmp_path, with_rounds(1), with_rounds(scale))
    assert done.exit_code == (verdict == "lost")
    found = json.loads(run(tmp_path, with_rounds(1), with_rounds(scale), "--json").stdout)
    assert {ratio["what"]: ratio["verdict"] for ratio in found["ratios"]} == {
        "rows loop ratio_to_loop": verdict,
        "rows peer petseg_times_as_fast once_running median": verdict,
    }
    told = [line for line in done.stdout.splitlines() if "side by side, lost: 2 before, 1.6 now" in line]
    assert len(told) == (2 if verdict else 0)
    assert run(tmp_path, with_rounds(1), with_rounds(0.78), with_rounds(0.8)).exit_code == 0, (
        "the earlier record was as low"
    )


def test_a_missing_ratio_fails(tmp_path: Path) -> None:
    new = with_rounds(1)
    new["rows"][1]["petseg_times_as_fast"]["once_running"] = None
    done = run(tmp_path, with_rounds(1), new)
    assert done.exit_code == 1
    assert "gone  rows peer petseg_times_as_fast once_running median" in done.stdout


def test_a_new_version_of_an_engine_keeps_its_row(tmp_path: Path) -> None:
    old, new = (
        {"rows": [{"engine": f"PyTorch {version}, eager", "precision": "f32", "milliseconds": [1.0] * 5}]}
        for version in ("2.9.1", "2.15.0")
    )
    done = run(tmp_path, old, new)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0].endswith("rows PyTorch, eager f32 milliseconds")
    assert compare.without_version("width 64, at 1.5") == "width 64, at 1.5"


def test_the_span_from_first_to_last_mask_is_compared_as_a_time() -> None:
    folder = {"photos": 100, "first_to_last": [1.0, 2.0], "first_to_last_of_petseg": [3.0, 4.0]}
    one_photo = {"first_to_last": [0.0, 0.0]}
    found = dict(compare.times_in({"name": "a", "folder": folder, "startup": one_photo}))
    assert found == {"a folder first_to_last": [1.0, 2.0]}


def test_the_result_can_be_written_to_a_file(tmp_path: Path) -> None:
    output = tmp_path / "repeat.json"
    machine = {"cpu": "EPYC", "calibration": {"gflops": 50.0}}
    old, new = record(1, 1, date="2026-11-23", commit="abc", machine=machine), record(1.3, 2, date="2026-11-24")
    done = run(tmp_path, old, new, "--output", str(output))
    assert done.exit_code == 1
    assert "slower" in done.stdout, "what is printed stays as it is"
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["command"] == "python -m benchmarks compare 0 1 --tolerance 0.05"
    assert found["sessions"] == [
        {"dates": ["2026-11-23"], "commits": ["abc"], "cpus": ["EPYC"], "gflops": [50.0, 50.0]},
        {"dates": ["2026-11-24"], "commits": [], "cpus": ["EPYC"], "gflops": None},
    ]
    first = found["rows"][0]
    for what, saved in (("old", old), ("new", new)):
        times = saved["rows"][0]["seconds"]["command"]
        assert first[what] == {"median": pytest.approx(np.median(times)), "min": min(times), "max": max(times)}
    assert first["ratio"] == pytest.approx(first["new"]["median"] / first["old"]["median"])
    assert [row["verdict"] for row in found["rows"]] == ["slower", "slower", ""]
    assert (found["summary"]["times"]["alike"], found["summary"]["times"]["of"]) == (1, 3)
    assert found["summary"]["times"]["worst"]["ratio"] == pytest.approx(1.3, rel=0.05)


def folder(path: Path, **saved: dict[str, Any]) -> str:
    path.mkdir()
    for name, value in saved.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return str(path)


def test_folders_are_compared_record_by_record(tmp_path: Path) -> None:
    fast, slow = ({"machine": {"calibration": {"gflops": speed}}} for speed in (100, 70))
    old = folder(
        tmp_path / "old", video=record(1, 1, **fast), peers=record(1, 1), soak=record(minutes=30), ours=record()
    )
    new = folder(
        tmp_path / "new",
        video=record(1.3, 2, **slow),
        peers=record(1, 2),
        soak=record(minutes=5, machine={"cpu": "Xeon"}),
    )
    done = CliRunner().invoke(compare.compare, [old, new])
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        "skipped: soak of different work: minutes: 30 before, 5 now",
        "video: the machine itself is 30 % slower: 100 GFLOP/s before, 70 now",
        "not in NEW: ours",
    ]
    slower = [line.split("slower  ")[1] for line in done.stdout.splitlines() if "slower  " in line]
    assert slower == [f"video rows openvino mask seconds {kind}" for kind in ("command", "loop")]
    assert "gone" not in done.stdout
    assert "peers rows PyTorch milliseconds" in done.stdout
    assert "soak" not in done.stdout


@pytest.mark.parametrize(("minutes", "code"), [(30, 0), (5, 1)])
def test_repeated_folders_pass_unless_a_workload_differs(tmp_path: Path, minutes: int, code: int) -> None:
    old = folder(tmp_path / "old", peers=record(1, 1), soak=record(minutes=30))
    new = folder(tmp_path / "new", peers=record(1, 2), soak=record(minutes=minutes))
    assert CliRunner().invoke(compare.compare, [old, new]).exit_code == code
