"""The tree of errors in the docstring is the one in the code, and says with what the program exits."""

import inspect

import saerelay.errors as errors

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def test_the_tree_lists_every_error() -> None:
    lines = [line.strip(" ├└─│") for line in (errors.__doc__ or "").splitlines()]
    listed = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in CLASSES]
    assert sorted(listed) == sorted(CLASSES)


def test_what_a_user_can_cause_exits_with_2_and_a_failed_leg_or_a_lost_process_with_1() -> None:
    for name, kind in CLASSES.items():
        if issubclass(kind, errors.SaeRelayError):
            assert kind.exit_code == (1 if name in ("LegFailed", "TeamError") else 2)
    assert not issubclass(errors.Interrupted, errors.SaeRelayError)
