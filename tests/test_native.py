"""How the compiled kernels are found, and what is said where they are not."""
import torch

from auglocal_ext.ops import _library


def test_why_kernels_are_missing(tmp_path, monkeypatch):
    assert "not built" in _library._load("libnowhere.so", True)
    assert _library._load("libauglocal_ext_cuda.so", False) == "this torch has no CUDA"
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    (tmp_path / "libbroken.so").write_bytes(b"not a library")
    assert "libbroken.so does not load" in _library._load("libbroken.so", True)
    monkeypatch.setenv("AUGLOCAL_NATIVE", "0")
    assert _library._load("libauglocal_ext.so", True) == "AUGLOCAL_NATIVE=0 is set"


def test_the_warning_is_given_once_a_device(recwarn):
    _library._say_once_what_is_slower.cache_clear()
    for _ in range(2):
        _library._say_once_what_is_slower("cuda")
        _library._say_once_what_is_slower("xpu")
    texts = [str(warning.message) for warning in recwarn]
    assert len(texts) == 2
    assert "in plain torch on cuda" in texts[0] and "Put nvcc on the PATH" in texts[0]
    assert "none are written for this device" in texts[1] and "Kernels exist for cpu and cuda." in texts[1]
    _library._say_once_what_is_slower.cache_clear()


def test_ops_of_another_device_run_in_plain_torch():
    x = torch.empty(2, 3, 4, 4, device="meta")
    affine = torch.empty(3, device="meta")
    y, mean, _ = torch.ops.auglocal_ext.batch_norm_act(x, affine, affine, None, 1e-5, True)
    assert y.shape == x.shape and mean.shape == (3,)
