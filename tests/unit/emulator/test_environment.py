"""What child processes find, and signs of a real CANN."""

from __future__ import annotations

import os

import pytest

from qwen2_npu.emulator import environment
from qwen2_npu.emulator.settings import VARIABLE, EmulatorError, Settings


def test_announced_settings_are_found_again():
    child: dict[str, str] = {}
    environment.announce(Settings(device_count=2), child)
    assert environment.announced(child) == Settings(device_count=2)
    assert environment.announced({}) is None
    assert child["TASK_QUEUE_ENABLE"] == "0"


def test_the_path_is_kept_and_grows_once():
    child = {"PYTHONPATH": os.pathsep.join(["/a", "/b"])}
    environment.announce(Settings(), child)
    environment.announce(Settings(), child)
    assert child["PYTHONPATH"].split(os.pathsep) == [str(environment.BOOTSTRAP), "/a", "/b"]


def test_something_else_in_the_variable():
    with pytest.raises(EmulatorError, match=VARIABLE):
        environment.announced({VARIABLE: "yes"})


@pytest.mark.parametrize("name", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_beside_a_real_cann_it_refuses(name, tmp_path):
    with pytest.raises(EmulatorError, match=rf"a real CANN or NPU is here.*{tmp_path}"):
        environment.refuse_beside_cann({name: str(tmp_path)})
    environment.refuse_beside_cann({name: str(tmp_path / "gone")})


@pytest.mark.parametrize("through_a_link", [False, True])
def test_the_folder_that_stands_for_cann_is_no_sign_of_one(through_a_link, tmp_path):
    folder = environment.TOOLKIT
    assert folder.is_dir()
    if through_a_link:
        folder = tmp_path / "link"
        folder.symlink_to(environment.TOOLKIT)
    assert str(folder) not in environment.signs_of_npu({environment.TOOLKIT_VARIABLE: str(folder)})
    # Only the folder itself.
    assert environment.signs_of_npu({environment.TOOLKIT_VARIABLE: str(folder.parent)})


def test_the_variable_is_hidden_from_torch_npu_and_set_afterwards(monkeypatch):
    monkeypatch.setenv(environment.TOOLKIT_VARIABLE, "/no/such/folder")
    with environment.toolkit_after():
        assert environment.TOOLKIT_VARIABLE not in os.environ
    assert os.environ[environment.TOOLKIT_VARIABLE] == str(environment.TOOLKIT)
