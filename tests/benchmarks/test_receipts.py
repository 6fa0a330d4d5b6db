"""All configs of the recorded exports are valid."""

from __future__ import annotations

from pathlib import Path

from benchmarks import receipts
from petseg_export import registry


def test_recorded_exports_only_use_settings_valid_for_their_format(tmp_path: Path) -> None:
    for name in ("native", "best"):
        (tmp_path / f"oxford-iiit-pet-{name}").mkdir()
    made = receipts.plan(tmp_path, tmp_path)
    assert len(made) == 9
    for config in made:
        registry._check_applies(config)
    calibrated = [config for config in made if config.quantize.data]
    assert [(type(config).__name__, config.precision) for config in calibrated] == [("OnnxConfig", "int8")]
