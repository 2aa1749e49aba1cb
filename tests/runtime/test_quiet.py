import logging
import sys
import warnings

import pytest

from comkd_cli.runtime.quiet import quiet


def test_nothing_is_printed_warned_or_logged_in_the_block(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with quiet():
        sys.stdout.write("progress")
        warnings.warn("deprecated", stacklevel=1)
        logging.getLogger("library").error("Traceback (most recent call last)")
    assert (capsys.readouterr().out, caplog.text) == ("", "")
    logging.getLogger("library").error("after")
    assert "after" in caplog.text


def test_messages_are_back_after_a_block_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="no"), quiet():
        raise ValueError("no")
    logging.getLogger("library").error("after")
    assert "after" in caplog.text
