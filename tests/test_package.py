"""What `import auglocal_ext` gives, and what it does not wait for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import auglocal_ext


def test_everything_public_is_there_at_its_first_use():
    program = """
import sys, auglocal_ext
assert "torch" not in sys.modules and set(auglocal_ext.__all__) <= set(dir(auglocal_ext))
assert not hasattr(auglocal_ext, "nothing") and "torch" not in sys.modules
assert auglocal_ext.train.__name__ == "train" and auglocal_ext.train is auglocal_ext.train
assert auglocal_ext.models.resnet20().fc.out_features == 10 and auglocal_ext.optim.constant(0, 1) == 1
from auglocal_ext import LocalTrainer, data, evaluate, plan, rules
assert (plan.__name__, evaluate.__name__, rules.__name__) == ("plan", "evaluate", "auglocal_ext.rules")
assert data.DeviceLoader and LocalTrainer.__name__ == "LocalTrainer"
from auglocal_ext import *
assert Rule is rules.Rule
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_type_checkers_are_told_the_same_names():
    """Those imported for them are the ones imported when used, from the same places."""
    (block,) = (node for node in ast.parse(Path(auglocal_ext.__file__).read_text()).body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(told) == sorted(auglocal_ext.__all__)
    assert {name: f".{module}" for name, module in told.items() if module} == auglocal_ext._HOMES


def test_a_name_that_there_is_none_of():
    with pytest.raises(AttributeError, match="module 'auglocal_ext' has no attribute 'trian'"):
        _ = auglocal_ext.trian
    with pytest.raises(ImportError, match="cannot import name 'trian'"):
        from auglocal_ext import trian  # noqa: F401
