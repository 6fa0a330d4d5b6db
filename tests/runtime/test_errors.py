"""The tree in the docstring matches the classes, and every class has its exit code."""

from __future__ import annotations

import inspect
import re

import pytest

from petseg_runtime import errors

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and name != "ClassVar"}
LINE = re.compile(r"^    (?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+)\s+(?P<code>\d+)?(?P<says>.*)$", re.MULTILINE)


def documented() -> dict[str, tuple[str | None, int | None]]:
    """Name -> (parent, code) as drawn in the module's docstring."""
    tree: dict[str, tuple[str | None, int | None]] = {}
    above: list[str] = []
    for line in LINE.finditer(errors.__doc__ or ""):
        level = len(line["indent"]) // 4
        above = [*above[:level], line["name"]]
        tree[line["name"]] = (above[level - 1] if level else None, int(line["code"]) if line["code"] else None)
    return tree


def test_dunder_all_lists_every_error_and_both_codes_in_order() -> None:
    public = [name for name in vars(errors) if not name.startswith("_") and name not in ("ClassVar", "annotations")]
    assert sorted(errors.__all__) == sorted(public)
    assert errors.__all__ == sorted(errors.__all__, key=lambda name: (not name.isupper(), name))


def test_the_docstring_draws_every_class_under_its_parent() -> None:
    tree = documented()
    assert set(tree) == set(CLASSES)
    for name, (parent, _) in tree.items():
        also = (ValueError,) if name == "UsageError" else ()
        assert CLASSES[name].__bases__ == (CLASSES[parent] if parent else Exception, *also), name


def test_the_docstring_gives_each_class_its_exit_code() -> None:
    tree = documented()
    for name, (parent, code) in tree.items():
        if code is None:  # then it inherits its parent's
            assert parent is not None
            assert "exit_code" not in vars(CLASSES[name]), name
            assert CLASSES[name].exit_code == CLASSES[parent].exit_code, name
        else:
            assert CLASSES[name].exit_code == code, name


def test_every_error_family_has_a_unique_exit_code() -> None:
    families = errors.PetsegError.__subclasses__()
    codes = [family.exit_code for family in families if family is not errors.InputError]
    assert errors.InputError.exit_code == errors.PetsegError.exit_code == 1
    assert errors.UsageError.exit_code == 2  # Click's, too
    taken = [0, 1, errors.EXIT_PARTIAL, errors.EXIT_INTERRUPTED]
    assert len({*codes, *taken}) == len(codes) + len(taken)
    assert all(0 < code < 126 for code in codes)  # from 126 on, exit codes have a meaning for shells


def test_the_two_codes_without_a_class_match_the_docstring() -> None:
    text = " ".join((errors.__doc__ or "").split())
    assert f"``EXIT_PARTIAL`` ({errors.EXIT_PARTIAL}:" in text
    assert f"``EXIT_INTERRUPTED`` ({errors.EXIT_INTERRUPTED}:" in text


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_keeps_its_message_and_is_caught_by_the_base(name: str) -> None:
    with pytest.raises(errors.PetsegError, match="why it failed"):
        raise CLASSES[name]("why it failed")
    assert CLASSES[name].__doc__
