from comkd_cli.events import Event, Notice, Stage, once


def test_a_notice_passes_once_and_everything_else_always() -> None:
    passed: list[Event] = []
    seen: set[str] = set()
    for _ in range(2):  # two reports that share what was shown
        report = once(passed.append, seen)
        for event in (Stage("one"), Notice("a"), Notice("a"), Notice("b")):
            report(event)
    assert passed == [Stage("one"), Notice("a"), Notice("b"), Stage("one")]
