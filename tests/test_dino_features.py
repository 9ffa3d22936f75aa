"""dino_features.py: frozen features, also over several processes."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, assert_near, run_script, sharp_nano, tensor
from torch.utils.data import DataLoader, Dataset

import dino_features
import utils

# ---- features ----


class Levels(Dataset):
    """Images of one level each, and their places."""

    def __init__(self, number, dtype):
        self.number, self.dtype = number, dtype

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        image = torch.full((3, 4, 4), 10 * i + 5, dtype=torch.uint8)
        return (image if self.dtype == torch.uint8 else utils.normalize(image)), i


class FirstPixel(nn.Module):
    """[B, 3, h, w] -> the first pixel of each image [B, 3] in float64, times a parameter."""

    def __init__(self, as_tuple=False):
        super().__init__()
        self.gain, self.as_tuple = nn.Parameter(torch.tensor(2.0)), as_tuple

    def forward(self, x):
        features = (self.gain * x[:, :, 0, 0]).double()
        return (features, None) if self.as_tuple else features


def expected_features(number):
    rows = []
    for i in range(number):
        level = (10 * i + 5) / 255
        rows.append([2 * (level - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))])
    return rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_features_come_in_the_order_of_the_data_set(dtype, as_tuple):
    loader = DataLoader(Levels(11, dtype), batch_size=3, sampler=[7, 2, 10, 0, 1, 9, 8, 3, 4, 6, 5])
    features = dino_features.extract_features(FirstPixel(as_tuple), loader)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert_near(features, expected_features(11), 1e-6)


def test_multi_scale_features_are_the_normalized_mean_over_three_scales():
    images = tensor("images", (2, 3, 64, 48))
    network = nn.Sequential(nn.Conv2d(3, 5, 7, stride=3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        half = F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False)
        middle = F.interpolate(images, scale_factor=1 / math.sqrt(2), mode="bilinear", align_corners=False)
        assert (half.shape[2:], middle.shape[2:]) == ((32, 24), (45, 33))
        want = (network(images) + network(middle) + network(half)).double() / 3
        assert_near(dino_features.multi_scale(images, network), want / want.norm(dim=1, keepdim=True), 1e-6)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_features_over_scales_are_extracted_on_demand(as_tuple):
    features = dino_features.extract_features(FirstPixel(as_tuple), DataLoader(Levels(3, torch.uint8)), multiscale=True)
    want = np.array(expected_features(3))  # images of one level look the same at each scale
    assert_near(features, want / np.linalg.norm(want, axis=1, keepdims=True), 1e-6)


# ---- precision ----


class Pictures(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return tensor(f"picture {i}", (3, 32, 32)), i


@pytest.mark.parametrize("multiscale", [False, True])
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_features_in_half_precision_are_close_and_stored_in_float32(multiscale, amp_dtype):
    model, loader = sharp_nano(32), DataLoader(Pictures(), batch_size=4)
    exact = dino_features.extract_features(model, loader, multiscale=multiscale)
    rounded = dino_features.extract_features(model, loader, multiscale=multiscale, amp_dtype=amp_dtype)
    assert rounded.dtype == torch.float32
    assert_near(rounded, exact, 2e-2)
    assert (rounded - exact).norm() > 1e-4 * exact.norm()


def test_float32_leaves_the_settings_of_a_gpu_as_they_are(monkeypatch):
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for products, convolutions in ((False, True), (True, False)):
        for backend, allowed in zip(backends, (products, convolutions), strict=True):
            monkeypatch.setattr(backend, "allow_tf32", allowed)
        assert dino_features.pick_dtype(torch.device("cuda"), "float32") is None
        assert [backend.allow_tf32 for backend in backends] == [products, convolutions]
    assert dino_features.pick_dtype(torch.device("cuda"), "tf32") is None
    assert torch.backends.cuda.matmul.allow_tf32
    assert dino_features.pick_dtype(torch.device("cpu"), "bf16") == torch.bfloat16


# ---- two processes ----


TWO_PROCESSES = """
import argparse, json, sys
sys.path.insert(0, {root!r})
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
import dino_features, utils

{classes}

args = argparse.Namespace(device="cpu", dist_url="file://{folder}/meeting")
utils.init_distributed_mode(args)
rank = utils.get_rank()
utils.log("printed once")

data = Levels(7, torch.uint8)
loader = DataLoader(data, batch_size=3, sampler=DistributedSampler(data, shuffle=False))
features = dino_features.extract_features(FirstPixel(), loader)

meter = utils.SmoothedValue()
for value in ((1.0, 2.0), (6.0, torch.tensor(3.0), 13.0))[rank]:
    meter.update(value)
meter.synchronize_between_processes()

utils.save_on_master({{"rank": rank}}, "{folder}/saved.pth")
result = {{
    "rank": [args.rank, args.world_size, args.gpu, rank, utils.get_world_size(), utils.is_main_process()],
    "features": None if features is None else features.tolist(),
    "meter": [meter.count, meter.total, meter.global_avg, meter.avg],
}}
print(json.dumps(result))
utils.leave_processes()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two real processes found: [(result, the lines they printed before it)]."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    classes = inspect.getsource(Levels) + inspect.getsource(FirstPixel)
    script.write_text(TWO_PROCESSES.format(root=str(ROOT), classes=classes, folder=folder))
    done = run_script(script, processes=2)
    results, lines = [], []
    for line in done.stdout.splitlines():  # of rank 0, then of rank 1
        if line.startswith("{"):
            results.append((json.loads(line), lines))
            lines = []
        else:
            lines.append(line)
    return results


def test_each_of_two_processes_knows_its_place(two_processes):
    assert [result["rank"] for result, _ in two_processes] == [[0, 2, 0, 0, 2, True], [1, 2, 1, 1, 2, False]]


def test_two_processes_gather_features_in_order_on_rank_0_alone(two_processes):
    (first, _), (second, _) = two_processes
    assert_near(first["features"], expected_features(7), 1e-6)
    assert second["features"] is None


def test_two_processes_add_up_their_meters_and_keep_their_windows(two_processes):
    (first, _), (second, _) = two_processes
    assert first["meter"] == [5, 25, 5, 1.5]
    assert second["meter"][:3] == [5, 25, 5]
    assert second["meter"][3] == pytest.approx(22 / 3)


def test_only_rank_0_of_two_prints(two_processes):
    (_, first), (_, second) = two_processes
    assert first[0] == "printed once"
    assert any(line.startswith("Features:") for line in first)
    assert second == []
