import pytest

from comkd_cli.cli.app import _fail
from comkd_cli.cli.terminal import messages, output, reporting
from comkd_cli.runtime import collectives, ranks


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def as_torchrun(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, per_machine: int) -> None:
    """The variables that torchrun sets."""
    variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": per_machine}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def test_alone_there_is_one_process() -> None:
    assert (ranks.world_size(), ranks.rank(), ranks.is_main(), ranks.per_machine()) == (1, 0, True, 1)
    assert not ranks.on_several_machines()
    assert ranks.share([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "8"}, {"RANK": "3", "WORLD_SIZE": "8"}, {"LOCAL_WORLD_SIZE": "8"}]
)
def test_what_a_batch_script_sets_for_itself_does_not_count(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (ranks.world_size(), ranks.rank(), ranks.per_machine()) == (1, 0, 1)


def test_torchruns_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    as_torchrun(monkeypatch, rank=5, world_size=8, per_machine=4)
    assert (ranks.world_size(), ranks.rank(), ranks.is_main(), ranks.per_machine()) == (8, 5, False, 4)
    assert ranks.on_several_machines()
    as_torchrun(monkeypatch, rank=0, world_size=8, per_machine=8)
    assert ranks.is_main()
    assert not ranks.on_several_machines()


def test_shares_are_everything_once_and_alike_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        as_torchrun(monkeypatch, rank, 3, 3)
        shares.append(list(ranks.share(range(11))))
    assert sorted(index for share in shares for index in share) == list(range(11))
    assert sorted(map(len, shares)) == [3, 4, 4]


def test_alone_a_process_is_told_what_it_says() -> None:
    assert collectives.all_gather_ints([3, 4]) == [[3, 4]]
    assert collectives.all_gather("x") == collectives.gather("x") == ["x"]
    assert collectives.broadcast({"a": 1}) == {"a": 1}
    collectives.barrier()
    with collectives.main_first():
        pass


def test_one_process_speaks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from comkd_cli.events import Notice

    for rank in (0, 1):
        as_torchrun(monkeypatch, rank, 2, 2)
        messages().print(f"messages of {rank}")
        output().print(f"output of {rank}")
        with reporting() as report:
            report(Notice(f"report of {rank}"))
    said = capfd.readouterr()
    assert said.out.split("\n")[:-1] == ["output of 0"]
    assert "messages of 0" in said.err
    assert "report of 0" in said.err
    assert "of 1" not in said.err


def test_an_error_of_another_process_says_whose_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("comkd_cli.cli.app.time.sleep", waited.append)
    as_torchrun(monkeypatch, rank=1, world_size=2, per_machine=2)
    with pytest.raises(SystemExit):
        _fail("no memory left", 1)
    assert "process 1: no memory left" in capsys.readouterr().err
    assert waited  # for the main process to say it first


def test_an_interruption_is_told_by_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_torchrun(monkeypatch, rank=1, world_size=2, per_machine=2)
    with pytest.raises(SystemExit) as left:
        _fail("stopped; the state is saved", 143)
    assert left.value.code == 143
    assert capsys.readouterr().err == ""
