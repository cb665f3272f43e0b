"""Configuration files complete the environment."""

from __future__ import annotations

import os

import pytest

from shared_store.base import config_file, envs
from shared_store.base.durations import parse_duration
from shared_store.base.errors import ConfigError
from shared_store.base.workload_settings import CompleteSettings, WorkloadSettings


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home with no file and no variable set."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", *(name for variable in envs.REGISTRY for name in variable.names)):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".config" / "wooly").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def own(home):
    """The path of the user's file."""
    return home / ".config" / "wooly" / "config"


def test_a_key_of_the_users_file_counts(own):
    own.write_text("# a comment\n\nexport WOOLY_IDLE_AFTER = '90s'\nPRIO=2\n")
    assert envs.IDLE_AFTER.get() == 90.0
    assert envs.PRIORITY.get() == 2


def test_xdg_config_home_has_the_file(home, monkeypatch):
    elsewhere = home / "elsewhere" / "wooly"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config").write_text("WOOLY_TURN=8s")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(elsewhere.parent))
    assert envs.TURN.get() == 8.0


def test_the_environment_wins_then_the_named_file_then_the_users(home, own, monkeypatch):
    """Each of the three places, and the aliases of a name within one."""
    own.write_text("WOOLY_PRIORITY=1\nWOOLY_TURN=1s\n")
    named = home / "named"
    named.write_text("PRIO=2\n")
    monkeypatch.setenv("WOOLYAI_CLIENT_CONFIG", str(named))
    monkeypatch.setenv("WOOLY_TURN", "3s")
    assert envs.PRIORITY.get() == 2
    assert envs.TURN.get() == 3.0
    monkeypatch.setenv("PRIO", "4")
    assert envs.PRIORITY.get() == 4
    monkeypatch.setenv("WOOLYAI_PRIO", "3")
    assert envs.PRIORITY.get() == 3
    monkeypatch.setenv("WOOLY_PRIORITY", "0")
    assert envs.PRIORITY.get() == 0


def test_other_keys_of_the_vendors_client_are_ignored(own):
    own.write_text(
        "ADDRESS=10.0.0.1\nPORT=443\nSSL=true\nGPU_MODE=Shared\nREQUIRED_VRAM=16000\nCONTROLLER_URL=http://a/?b=c\n"
        "WOOLYAI_WEIGHTS_DEDUP=1\nWOOLYAI_SWAP_FROM_VRAM=false\n"
    )
    assert envs.WEIGHTS_DEDUP.get()
    assert not envs.SWAP_FROM_VRAM.get()


def test_a_file_is_read_again_when_it_changes(own):
    own.write_text("PRIO=1")
    assert envs.PRIORITY.get() == 1
    changed = own.with_name("new")
    changed.write_text("PRIO=2")
    changed.replace(own)
    assert envs.PRIORITY.get() == 2
    own.unlink()
    assert envs.PRIORITY.get() == 0


def test_a_wrong_value_is_an_error_with_its_place_and_the_right_ones(own):
    own.write_text("PRIO=high\n")
    with pytest.raises(ConfigError, match=rf"PRIO='high' in {own}: use 0 \(highest\) to 4"):
        envs.PRIORITY.get()


def test_a_line_of_another_form_is_an_error_with_its_number(own):
    own.write_text("PRIO=1\n[section]\n")
    with pytest.raises(ConfigError, match=rf"{own}, line 2: '\[section\]' is not of the form KEY=VALUE"):
        envs.PRIORITY.get()


def test_a_named_file_must_exist_and_be_readable(home, monkeypatch):
    monkeypatch.setenv("WOOLYAI_CLIENT_CONFIG", str(home / "none"))
    with pytest.raises(ConfigError, match=r"WOOLYAI_CLIENT_CONFIG=.*No such file"):
        envs.PRIORITY.get()
    monkeypatch.setenv("WOOLYAI_CLIENT_CONFIG", str(home))
    with pytest.raises(ConfigError, match=r"WOOLYAI_CLIENT_CONFIG=.*directory"):
        envs.PRIORITY.get()


def test_a_users_file_that_cannot_be_read_is_left_out(own):
    """In containers, `$HOME` is often a directory of another user, or a file."""
    own.mkdir()
    assert envs.PRIORITY.get() == 0


def test_a_file_names_no_other_file_and_no_workload_of_a_process(home, own):
    """Variables that are of one process alone are not read from files."""
    own.write_text(f"WOOLY_MEMBER_OF=abc\nWOOLYAI_CLIENT_CONFIG={home / 'none'}\n")
    assert envs.MEMBER_OF.get() == ""
    assert envs.CLIENT_CONFIG.get() is None


def test_a_user_without_a_home_has_no_file(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    assert config_file.default_path().name == "config"
    assert list(config_file.files()) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("300s", 300), ("30m", 1800), ("1.5h", 5400), ("250ms", 0.25), ("2d", 172800), ("7", 7), (" 5 S ", 5), ("0", 0)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1e3", "5 min", "1h30m", "inf", "nan", "٣"])
def test_texts_that_are_no_durations(text):
    assert parse_duration(text) is None


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (envs.VRAM_RESERVE, "", None),
        (envs.VRAM_RESERVE, "0", 0),
        (envs.VRAM_RESERVE, "4GiB", 4 << 30),
        (envs.HOST_BUDGET, "1.5GiB", 3 << 29),
        (envs.DEEP_AFTER, "0", 0.0),
        (envs.PRIORITY, "P3", 3),
        (envs.SWAP_FROM_VRAM, "True", True),
        (envs.SWAP_FROM_VRAM, "0", False),
        (envs.COMPUTE_SHARE, "0", 0.0),
        (envs.COMPUTE_SHARE, "33.3%", 33.3),
        (envs.GPU_MODE, "Exclusive", True),
        (envs.GPU_MODE, "shared", False),
        (envs.MPS_PERCENT, "", None),
        (envs.MPS_PERCENT, "25", 25),
        (envs.ARBITER, "0", False),
        (envs.MAX_HOLD, "2s", 2.0),
    ],
)
def test_values_of_a_workload_and_a_node(variable, text, value):
    assert variable.parse(text) == value


@pytest.mark.parametrize(
    ("variable", "text", "listed"),
    [
        (envs.VRAM_RESERVE, "2GB", "2GiB"),
        (envs.HOST_BUDGET, "much", "2GiB"),
        (envs.IDLE_AFTER, "five minutes", "300s, 30m or 2h"),
        (envs.PRIORITY, "5", r"0 \(highest\) to 4"),
        (envs.SWAP_FROM_VRAM, "maybe", "1 or 0, or true or false"),
        (envs.COMPUTE_SHARE, "0.5", "a percentage from 1 to 100, or 0"),
        (envs.COMPUTE_SHARE, "nan", "a percentage from 1 to 100, or 0"),
        (envs.GPU_MODE, "alone", "Shared or Exclusive"),
        (envs.MPS_PERCENT, "0", "a whole percentage from 1 to 100"),
        (envs.MAX_HOLD, "long", "300s, 30m or 2h"),
    ],
)
def test_wrong_values_list_the_right_ones(monkeypatch, variable, text, listed):
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(ConfigError, match=f"{variable.name}='{text}': .*{listed}"):
        variable.get()


def test_settings_of_a_workload_complete_with_the_environments(home, monkeypatch):  # noqa: ARG001 - unsets variables
    def complete(name, priority, *, swap=True, share=0.0, exclusive=False):
        return CompleteSettings(name, priority, swap=swap, compute_share=share, exclusive=exclusive)

    assert WorkloadSettings().completed() == complete("", 0)
    monkeypatch.setenv("WOOLY_WORKLOAD", "batch")
    monkeypatch.setenv("PRIO", "4")
    monkeypatch.setenv("WOOLY_COMPUTE_SHARE", "12.5%")
    monkeypatch.setenv("GPU_MODE", "exclusive")
    assert WorkloadSettings(swap=False).completed() == complete("batch", 4, swap=False, share=12.5, exclusive=True)
    assert WorkloadSettings("chat", 0, compute_share=0, exclusive=False).completed() == complete("chat", 0)


@pytest.mark.parametrize(
    ("given", "listed"),
    [
        ({"priority": 5}, "0 .highest. to 4"),
        ({"priority": True}, "0 .highest. to 4"),
        ({"swap": "no"}, "true or false"),
        ({"workload": 3}, "a text"),
        ({"compute_share": 0.5}, "a percentage from 1 to 100, or 0"),
        ({"compute_share": 101}, "a percentage from 1 to 100, or 0"),
        ({"compute_share": float("nan")}, "a percentage from 1 to 100, or 0"),
        ({"compute_share": True}, "a percentage from 1 to 100, or 0"),
        ({"exclusive": 1}, "true or false"),
    ],
)
def test_wrong_settings_of_a_workload_list_the_right_ones(given, listed):
    with pytest.raises(ConfigError, match=listed):
        WorkloadSettings(**given)
