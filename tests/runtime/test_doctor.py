"""Doctor survives and reports whatever a vendor's library does: crashes, hangs, garbage, and wrong masks."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from petseg.cli import run
from petseg_runtime import doctor, doctor_probe, host, onnx_metadata, parity
from petseg_runtime.artifact import RECEIPT_KEY, Artifact, open_artifact
from petseg_runtime.cli.doctor import cpu_lines
from petseg_runtime.doctor import EngineCheck, Examination, Ffmpeg, RuleLine, ask, check_engine, examine, probe
from petseg_runtime.engines.registry import ENGINES, RULE
from petseg_runtime.errors import ModelError
from petseg_runtime.extras import install
from petseg_runtime.host import Cpu, Gpu
from petseg_runtime.verify import proof_for

ORT = RuleLine(
    engine="onnxruntime", device="cpu", text="onnxruntime on cpu", module="onnxruntime", extra="cpu", run_by_us=True
)
GPU = Gpu(index=0, name="NVIDIA RTX", compute_capability="8.9", memory=2**34, driver="CUDA 13.0")

CPU = Cpu(name="CPU", machine="x86_64", cores=8, quota=None, memory=2**34, memory_limit=None, features=())


def program(text: str, deadline: float = 60) -> dict[str, Any]:
    """The answer for a program that runs in place of a probe."""
    return ask((sys.executable, "-c", "import os, signal, sys, time\n" + text), deadline)


def test_a_probes_answer_is_read_and_other_output_ignored() -> None:
    assert program("print('noise', file=sys.stderr); print('{\"a\": [1]}')") == {"a": [1]}


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE"])
def test_a_crash_is_reported_with_its_signal_and_last_output(name: str) -> None:
    answer = program(f"print('first\\nlast  words\\n', file=sys.stderr); os.kill(os.getpid(), signal.{name})")
    assert answer == {"error": f"it crashed: {name} (last words)"}


def test_an_illegal_instruction_has_a_remedy() -> None:
    error = program("os.kill(os.getpid(), signal.SIGILL)")["error"]
    assert error.startswith("it crashed: SIGILL, it uses instructions that this processor does not have: install")


def test_a_process_killed_by_the_system_is_reported_as_out_of_memory() -> None:
    assert "SIGKILL, the system killed it, most likely because memory" in program("os.kill(os.getpid(), 9)")["error"]


def test_a_crash_after_the_answer_is_a_crash() -> None:
    """GPU libraries sometimes crash when the process exits; `petseg infer` would crash as well."""
    crash = "os.kill(os.getpid(), signal.SIGSEGV)"
    assert program(f"print('{{}}', flush=True); {crash}") == {"error": "it crashed: SIGSEGV"}


def test_a_hanging_probe_is_killed_with_its_children(tmp_path: Path) -> None:
    started = tmp_path / "started"
    text = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert program(text, 3) == {"error": "no answer within 3 s: it hangs"}
    child = int(started.read_text())
    for _ in range(100):  # its new parent process reaps it
        try:
            if "State:\tZ" in Path(f"/proc/{child}/status").read_text():
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.1)
    pytest.fail("the probe's child process is still running")


@pytest.mark.parametrize("rubbish", ["", "hello", "[1]", "null", "{", "7"])
def test_invalid_output_is_not_an_answer(rubbish: str) -> None:
    assert program(f"print({rubbish!r})")["error"].startswith("it exited with code 0 and ")


def test_an_answer_with_a_nonzero_exit_code_is_a_failure() -> None:
    assert program("print('{}'); sys.exit(3)") == {"error": "it exited with code 3 and an answer"}


def test_ctrl_c_ends_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    real = os.killpg

    def interrupted(self: Any, **_: Any) -> None:
        raise KeyboardInterrupt

    def killed(group: int, number: int) -> None:
        ended.append(group)
        real(group, number)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    monkeypatch.setattr(os, "killpg", killed)
    with pytest.raises(KeyboardInterrupt):
        program("time.sleep(600)")
    assert len(ended) == 1


def test_a_librarys_output_does_not_corrupt_the_answer() -> None:
    text = (
        "from petseg_runtime import doctor_probe\n"
        "def noisy():\n"
        "    print('from Python'); sys.stdout.flush(); os.write(1, b'from C'); return {'a': 1}\n"
        "doctor_probe.QUESTIONS['noisy'] = noisy\n"
        "doctor_probe.main(['noisy'])"
    )
    assert program(text) == {"a": 1}


def test_any_exception_of_a_library_is_reported() -> None:
    text = "from petseg_runtime import doctor_probe\nasked = doctor_probe.QUESTIONS\n"
    raises = "def odd():\n    raise {}\nasked['odd'] = odd\ndoctor_probe.main(['odd'])"
    assert program(text + raises.format("AttributeError('no\\n  kernels')")) == {"error": "AttributeError: no kernels"}
    ours = "from petseg_runtime.errors import EngineError\n" + text + raises.format("EngineError('not here: do this')")
    assert program(ours) == {"error": "not here: do this"}


def test_doctor_follows_the_registrys_rule() -> None:
    lines, problem = doctor.read_rule()
    assert problem == ""
    assert [(line.engine, line.device, line.text) for line in lines] == [(c.engine, c.kind, str(c)) for c in RULE]
    for line in lines:
        assert line.module == ENGINES[line.engine].module
        assert line.run_by_us == (line.device in ENGINES[line.engine].run_by_us)
    assert {line.engine for line in lines if line.compiles} == {"tensorrt", "tensorrt-rtx"}
    extras = {(line.engine, line.device): line.extra for line in lines}
    assert (extras["onnxruntime", "cpu"], extras["onnxruntime", "cuda"]) == ("cpu", "gpu")


def test_an_engine_with_correct_masks_works() -> None:
    check = check_engine(ORT, ())
    assert check.works, check.why
    assert (check.why, check.device, check.precision, check.run_by_us) == ("", "cpu", "f32", True)
    assert check.packages[0].startswith("onnxruntime ")
    assert check.version in check.packages[0]
    assert check.photos == 16
    assert check.mean_mask_iou is not None
    assert check.mean_mask_iou > 0.999
    assert check.milliseconds is not None
    assert 0 < check.milliseconds < 10_000


def test_an_engine_with_wrong_masks_does_not_work(proven: Artifact, toy: Any) -> None:
    assert check_engine(ORT, (), model=proven.path).works
    toy(proven.path, channel=1)
    check = check_engine(ORT, (), model=proven.path)
    assert not check.works
    assert check.why.startswith("its masks are wrong: largest difference ")


def test_a_model_without_parity_record_runs_unverified(proven: Artifact) -> None:
    parity.proof_of(proven.path).unlink()
    check = check_engine(ORT, (), model=proven.path)
    assert (check.works, check.photos, check.mean_mask_iou) == (True, 0, None)


def test_a_parity_record_that_verify_rejects_is_not_used(proven: Artifact, prove: Callable[..., parity.Proof]) -> None:
    """It is of the same checkpoint, but not the parity record that this file was exported with."""
    metadata = onnx_metadata.read(proven.path).metadata
    receipt = json.dumps({"proof": prove(proven.spec, 7).identity})
    proven.path.write_bytes(onnx_metadata.with_metadata(proven.path.read_bytes(), {**metadata, RECEIPT_KEY: receipt}))
    with pytest.raises(ModelError) as refused:
        proof_for(open_artifact(proven.path))
    check = check_engine(ORT, (), model=proven.path)
    assert (check.works, check.why) == (False, " ".join(str(refused.value).split())[:400])
    parity.proof_of(proven.path).write_bytes(prove(proven.spec, 7).to_bytes())
    assert check_engine(ORT, (), model=proven.path).photos == 7


def test_an_invalid_model_file_is_the_reported_reason() -> None:
    check = check_engine(ORT, (), model=Path("/nowhere.onnx"))
    assert not check.works
    assert check.why.startswith("/nowhere.onnx: ")


def test_a_missing_engine_is_not_tried_and_has_a_remedy() -> None:
    line = dataclasses.replace(ORT, engine="abacus", module="no_such_module", extra="abacus", run_by_us=False)
    check = check_engine(line, ())
    assert (check.works, check.packages, check.why) == (False, (), f"not installed: {install('abacus')}")


def test_without_a_gpu_gpu_engines_are_not_tried() -> None:
    line = dataclasses.replace(ORT, device="cuda")
    assert check_engine(line, ()).why == "not tried: no NVIDIA GPU was found"
    missing = dataclasses.replace(line, module="no_such_module")
    assert check_engine(missing, ()).why == "not tried: no NVIDIA GPU was found, and the engine is not installed"


def test_a_driver_that_does_not_start_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petseg_runtime.host.gpus", lambda: ())
    monkeypatch.setattr("petseg_runtime.host.driver_trouble", lambda: "the driver does not start: reboot")
    monkeypatch.setattr(doctor, "probe", lambda question: doctor_probe.QUESTIONS[question]())
    assert doctor.read_gpus() == ((), "the driver does not start: reboot")


def test_a_driver_that_crashes_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda question: {"error": "it crashed: SIGSEGV"})
    assert doctor.read_gpus() == ((), "NVIDIA's driver does not work: it crashed: SIGSEGV; reinstall it")


def test_a_crashing_engine_is_one_line_and_the_rest_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda *words, **_: {"error": "it crashed: SIGSEGV"})
    check = check_engine(dataclasses.replace(ORT, device="cuda"), (GPU,), "cuda:1")
    assert (check.device, check.works, check.why) == ("cuda:1", False, "it crashed: SIGSEGV")


def test_a_compiling_engine_gets_time_and_is_not_reported_as_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []

    def slow(command: Any, deadline: float, late: str = "") -> dict[str, Any]:
        deadlines.append(deadline)
        return ask((sys.executable, "-c", "import time; time.sleep(600)"), 0.2, late)

    monkeypatch.setattr(doctor, "ask", slow)
    line = dataclasses.replace(ORT, engine="abacus", device="cuda", compiles=True)
    check = check_engine(line, (GPU,), "cuda:1", Path("edge.onnx"))
    assert check.why == (
        "no answer within 0.2 s: it was still compiling, or hangs; `petseg infer PHOTO --backend abacus --device "
        "cuda:1 --model edge.onnx` compiles it once, without a time limit"
    )
    assert check_engine(dataclasses.replace(line, compiles=False), (GPU,)).why.endswith(": it hangs")
    assert deadlines == [1800, 300]
    assert line.trying == "abacus on cuda, which may compile for minutes"


def test_both_onnx_runtime_packages_at_once_are_a_problem_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor._problems((), (), Ffmpeg()) == []
    about = tmp_path / "onnxruntime_gpu-1.23.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.23.0\n")
    (about / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(tmp_path)
    doctor._packages.cache_clear()
    try:
        (problem,) = doctor._problems((), (), Ffmpeg())
        assert "onnxruntime-gpu 1.23.0" in check_engine(dataclasses.replace(ORT, device="cuda"), ()).packages
    finally:
        doctor._packages.cache_clear()
    assert problem.startswith("onnxruntime and onnxruntime-gpu are both installed")
    assert f"pip uninstall onnxruntime onnxruntime-gpu, then {install('gpu')}" in problem


def test_an_unused_gpu_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []
    monkeypatch.setattr(doctor, "_packages_of", lambda module: installed)
    check = EngineCheck(engine="a", device="cuda", packages=(), works=False, why="no", run_by_us=False)
    working = dataclasses.replace(check, device="cpu", works=True)
    (problem,) = doctor._problems((GPU,), (check, working), Ffmpeg())
    assert problem.endswith(f"no engine that uses it works: {install('rtx')}, or {install('gpu')}")
    installed.append("onnxruntime")
    (problem,) = doctor._problems((GPU,), (check, working), Ffmpeg())
    assert problem.endswith(f", or pip uninstall onnxruntime, then {install('gpu')}"), "or they break each other"
    spark = dataclasses.replace(GPU, compute_capability="12.1")
    assert install("rtx") in doctor._problems((spark,), (check, working), Ffmpeg())[0]
    hopper = dataclasses.replace(GPU, compute_capability="9.0")
    assert install("rtx") not in doctor._problems((hopper,), (check, working), Ffmpeg())[0]
    old = dataclasses.replace(GPU, driver="CUDA 12.4")
    assert "works: the driver is for CUDA 12.4" in doctor._problems((old,), (check, working), Ffmpeg())[0]
    assert doctor._problems((GPU,), (dataclasses.replace(check, works=True), working), Ffmpeg()) == []
    assert doctor._problems((), (check, working), Ffmpeg()) == []
    assert install("cpu") in doctor._problems((), (check,), Ffmpeg())[0]
    assert "PyAV does not work (gone)" in doctor._problems((), (), Ffmpeg(error="gone"))[0]


@pytest.mark.parametrize(
    ("driver", "said"), [("CUDA 12.6", "that of an earlier JetPack than 7"), ("CUDA 13.0", "python3-libnvinfer")]
)
def test_on_a_jetson_an_unused_gpu_needs_the_systems_tensorrt(
    driver: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (host, doctor):
        monkeypatch.setattr(module, "jetson", lambda: True)
    orin = dataclasses.replace(GPU, compute_capability="8.7", driver=driver)
    check = EngineCheck(engine="a", device="cuda", packages=(), works=False, why="no", run_by_us=False)
    working = dataclasses.replace(check, device="cpu", works=True)
    (problem,) = doctor._problems((orin,), (check, working), Ffmpeg())
    assert said in problem
    assert not re.search("onnxruntime|580|tensorrt>=", problem)


#: The probes' answers, by their words.
Answers: TypeAlias = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Examination, Answers]:
    """An examination of this machine, and what each probe answered, because the probes take nearly all of its time."""
    answers: Answers = {}

    def asked(*words: str, **options: Any) -> dict[str, Any]:
        answers[" ".join(words)] = answer = probe(*words, **options)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(doctor, "probe", asked)
        return examine(), answers


@pytest.fixture
def found(examined: tuple[Examination, Answers]) -> Examination:
    return examined[0]


@pytest.fixture
def answers(examined: tuple[Examination, Answers], monkeypatch: pytest.MonkeyPatch) -> Answers:
    """The probes' answers, which replace further probes of this process."""
    monkeypatch.setattr(doctor, "probe", lambda *words, **options: examined[1][" ".join(words)])
    return examined[1]


def test_doctor_works_on_this_machine(found: Examination) -> None:
    assert found.host.cpu.cores >= 1
    assert {(check.engine, check.device) for check in found.engines} == {(c.engine, c.kind) for c in RULE}
    assert found.works
    assert {check.why != "" for check in found.engines if check.works} == {False}
    assert all(check.why for check in found.engines if not check.works)
    working = {(check.engine, check.device) for check in found.engines if check.works}
    assert (found.auto["name"], found.auto["device"].partition(":")[0]) in working
    assert found.ffmpeg.decoders["mjpeg"] is True
    assert found.ffmpeg.encoders["png"] is True
    assert "libavcodec" in found.ffmpeg.libraries
    assert found.cache
    if importlib.util.find_spec("openvino"):
        assert "CPU" in found.openvino_devices


def test_missing_codecs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_probe, "_DECODERS", ("h264", "no-such-codec"))
    assert doctor_probe.ffmpeg()["decoders"] == {"h264": True, "no-such-codec": False}


def texts(found: Examination, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    monkeypatch.setattr(doctor, "examine", lambda watch: found)
    return (run(["doctor", *args]), *capsys.readouterr())


def test_the_text_output_is_a_readable_page(
    found: Examination, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = texts(dataclasses.replace(found, problems=("mend\nthis",)), monkeypatch, capsys)
    assert code == 0
    assert err == "petseg: mend\\nthis\n"
    assert "     engines  " in out
    assert f"works  onnxruntime on cpu (onnxruntime {found.host.packages['onnxruntime']}): f32, " in out
    assert "never run there by us" in out
    for number, choice in enumerate(RULE, 1):
        assert f"{number}. {choice}" in out
    assert "\nauto chooses  " in out
    assert "decodes  h264 " in out


def test_the_json_output_is_complete(
    found: Examination, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = texts(found, monkeypatch, capsys, "--json")
    assert (code, err) == (0, "".join(f"petseg: {problem}\n" for problem in found.problems))
    record = json.loads(out)
    assert record.pop("schema_version") == 1
    assert record == json.loads(json.dumps(dataclasses.asdict(found)))
    assert set(record) == {
        "host",
        "gpus",
        "openvino_devices",
        "rule",
        "engines",
        "auto",
        "ffmpeg",
        "cameras",
        "heic",
        "cache",
        "cache_bytes",
        "problems",
    }


def test_if_nothing_works_it_exits_with_5(
    found: Examination, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = dataclasses.replace(
        found,
        gpus=(GPU,),
        engines=tuple(dataclasses.replace(check, works=False, why="it crashed: SIGILL") for check in found.engines),
        auto={"error": "it crashed: SIGILL"},
        ffmpeg=Ffmpeg(error="gone"),
        cache="",
        host=dataclasses.replace(found.host, environment="", nvidia_driver="580.95.05"),
    )
    code, out, _ = texts(broken, monkeypatch, capsys)
    assert code == 5
    for line in (
        "auto chooses  none: it crashed: SIGILL",
        "FFmpeg  none: gone",
        "cuda:0 NVIDIA RTX, compute capability 8.9, 17.2 GB, driver supports CUDA 13.0",
        "driver 580.95.05",
        "environment  none: ",
        "cache  none: ",
    ):
        assert line in out
    assert "works  " not in out


@pytest.mark.parametrize("others", [True, False])
def test_wrong_masks_from_autos_choice_are_a_problem_and_exit_with_5(
    found: Examination, answers: Answers, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    """The rule only checks that an engine loads, so `petseg infer` would use its masks."""
    taken = found.auto["name"]
    other = "openvino" if taken == "onnxruntime" else "onnxruntime"

    def check(line: RuleLine, gpus: Any) -> EngineCheck:
        of_line = next(c for c in found.engines if (c.engine, c.device) == (line.engine, line.device))
        if (line.engine, line.device) == (taken, "cpu"):
            return dataclasses.replace(of_line, works=False, wrong=True, why="its masks are wrong: mean mask IoU 0.31")
        works = others and (line.engine, line.device) == (other, "cpu")
        return dataclasses.replace(of_line, works=works, why="" if works else "no")

    monkeypatch.setattr(doctor, "check_engine", check)
    result = doctor.examine()
    remedy = f"give --backend {other} --device cpu" if others else "install another version"
    (problem,) = [text for text in result.problems if text.startswith("auto chooses")]
    assert problem == f"auto chooses {taken} on cpu, and its masks are wrong: mean mask IoU 0.31: {remedy}"
    assert not result.works


def test_a_broken_numpy_is_the_reported_problem(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**answers, "rule": {"error": "it crashed: SIGILL"}, "auto": {"error": "it crashed: SIGILL"}}
    monkeypatch.setattr(doctor, "probe", lambda *words, **options: broken[" ".join(words)])
    found = examine()
    assert (found.works, found.rule, found.engines) == (False, (), ())
    assert found.problems == ("no engine can be tried: it crashed: SIGILL",)


def test_limits_of_the_control_group_are_shown() -> None:
    cpu = dataclasses.replace(CPU, quota=1.5, memory=16 * 10**9, memory_limit=2 * 10**9)
    lines = dict(cpu_lines(cpu))
    assert lines["processor"] == "CPU, x86_64, 8 usable cores, of which the control group allows 1.5"
    assert lines["memory"] == "16.0 GB, of which the control group allows 2.0"
    assert lines[""].startswith("no instruction set")


def test_doctor_itself_imports_neither_numpy_nor_an_engine(answers: Answers) -> None:
    text = (
        "import json, sys\nfrom petseg.cli import run\nfrom petseg_runtime import doctor\n"
        "answers = json.load(sys.stdin)\ndoctor.probe = lambda *words, **options: answers[' '.join(words)]\n"
        "code = run(['doctor', '--json'])\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\nsys.exit(code)"
    )
    command = [sys.executable, "-W", "error", "-c", text]
    done = subprocess.run(command, input=json.dumps(answers), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    modules = set(done.stderr.splitlines()[-1].split())
    assert "petseg_runtime" in modules
    assert modules & {"numpy", "PIL", "av", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch"} == set()
    assert json.loads(done.stdout)["schema_version"] == 1


def test_a_file_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('this is not numpy')")
    monkeypatch.chdir(tmp_path)
    assert "rule" in probe("rule")


def test_a_crash_leaves_no_core_file() -> None:
    text = (
        "import resource\nfrom petseg_runtime import doctor_probe\n"
        "asked = doctor_probe.QUESTIONS\n"
        "asked['limit'] = lambda: {'core': resource.getrlimit(resource.RLIMIT_CORE)[0]}\n"
        "doctor_probe.main(['limit'])"
    )
    assert program(text) == {"core": 0}
