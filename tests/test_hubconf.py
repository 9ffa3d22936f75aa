"""hubconf.py: each entry point builds the right network, loads the right file, and works offline."""

import inspect
import json
import os
import re
import sys

import pytest
import torch
from conftest import ROOT, run_script, tensor

import hubconf
import vision_transformer as vits

BASE = "https://dl.fbaipublicfiles.com/dino/"
# name: (stem of the published files, width, patch size)
PUBLISHED = {
    "dino_vits16": ("dino_deitsmall16", 384, 16),
    "dino_vits8": ("dino_deitsmall8", 384, 8),
    "dino_vitb16": ("dino_vitbase16", 768, 16),
    "dino_vitb8": ("dino_vitbase8", 768, 8),
    "dino_resnet50": ("dino_resnet50", 2048, None),
    "dino_xcit_small_12_p16": ("dino_xcit_small_12_p16", 384, 16),
    "dino_xcit_small_12_p8": ("dino_xcit_small_12_p8", 384, 8),
    "dino_xcit_medium_24_p16": ("dino_xcit_medium_24_p16", 512, 16),
    "dino_xcit_medium_24_p8": ("dino_xcit_medium_24_p8", 512, 8),
}
VITS = [name for name in PUBLISHED if "_vit" in name]


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.fixture
def published(monkeypatch):
    """Replaces the network: `state` is the content of every URL, `urls` has the URLs that were asked for."""

    class Published:
        state, urls = None, []

    published = Published()
    published.urls = []

    def download(url):
        published.urls.append(url)
        return published.state

    monkeypatch.setattr(hubconf, "_download", download)
    return published


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's folder of downloaded files, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


# ---- networks ----


@pytest.mark.parametrize("name", VITS)
def test_hub_builds_each_vit_and_passes_keywords_on(name):
    with torch.device("meta"):
        model = load(name, pretrained=False, drop_path_rate=0.2, img_size=[96])
    _, width, patch_size = PUBLISHED[name]
    assert (type(model).__name__, model.embed_dim, len(model.blocks)) == ("VisionTransformer", width, 12)
    assert model.patch_embed.patch_size == patch_size
    assert {block.attn.num_heads for block in model.blocks} == {width // 64}
    assert not [key for key in model.state_dict() if key.startswith("head")]
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.pos_embed.shape[1] == 1 + (96 // patch_size) ** 2


def test_hub_builds_resnet50_without_its_classifier_and_passes_keywords_on():
    model = load("dino_resnet50", pretrained=False, replace_stride_with_dilation=[False, False, True]).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2048)
    assert not [key for key in model.state_dict() if key.startswith("fc")]
    assert (model.layer4[0].conv2.stride, model.layer4[1].conv2.dilation) == ((1, 1), (2, 2))


@pytest.mark.parametrize("name", ["dino_xcit_small_12_p16", "dino_xcit_medium_24_p8"])
def test_hub_builds_each_xcit_and_passes_keywords_on(name):
    pytest.importorskip("timm")
    model = load(name, pretrained=False, drop_path_rate=0.25).eval()
    _, width, patch_size = PUBLISHED[name]
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 32)).shape == (1, width)
    assert model.patch_embed.patch_size == patch_size
    assert len(model.blocks) == (24 if "24" in name else 12)
    assert {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"} == {0.25}


def test_an_xcit_without_timm_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        hubconf.dino_xcit_small_12_p8(pretrained=False)
    assert hubconf.dino_vits16(pretrained=False).embed_dim == 384


def test_hub_works_offline_and_imports_neither_timm_nor_a_module_called_utils():
    code = f"""
import json, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a network connection was opened")
socket.socket.connect = socket.getaddrinfo = refuse
del sys.path[0]  # the checkout, where python -c runs
import torch
for name in ("dino_vits16", "dino_resnet50"):
    torch.hub.load({str(ROOT)!r}, name, source="local", pretrained=False)
print(json.dumps(sorted(sys.modules)))
"""
    modules = set(json.loads(run_script("-c", code, fresh=True).stdout.splitlines()[-1]))
    assert not {"vision_transformer", "utils", "timm", "yaml"} & modules
    assert not {name for name in modules if name.startswith(("dino_", "main_dino"))}


@pytest.mark.parametrize("first", [True, False])
def test_hub_works_beside_a_users_modules_of_the_same_names(tmp_path, first):
    for name in ("utils", "vision_transformer"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    code = f"""
import sys
sys.path[0] = {str(tmp_path)!r}
import torch
{"import utils, vision_transformer" if first else ""}
before = list(sys.path)
model = torch.hub.load({str(ROOT)!r}, "dino_vits16", source="local", pretrained=False, depth=1)
again = torch.hub.load({str(ROOT)!r}, "dino_vits8", source="local", pretrained=False, depth=1)
import utils, vision_transformer
assert utils.mine and vision_transformer.mine
assert type(model) is type(again)
assert sys.path[: len(before)] == before
assert {str(ROOT)!r} not in sys.path[len(before) :]
print(model(torch.zeros(1, 3, 32, 32)).shape)
"""
    assert "[1, 384]" in run_script("-c", code, fresh=True).stdout


def test_the_class_is_the_projects_own_where_it_is_imported():
    assert isinstance(load("dino_vits16", pretrained=False, depth=1), vits.VisionTransformer)


# ---- the list of entry points ----


def test_all_public_functions_are_documented_entry_points():
    public = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert sorted(public) == sorted([*hubconf.PUBLISHED, "resnet18_cifar", "resnet8"])
    assert sorted(hubconf.PUBLISHED) == sorted(PUBLISHED)
    assert set(hubconf.dependencies) == {"torch", "torchvision"}
    for name in PUBLISHED:
        pretrained, keywords = inspect.signature(getattr(hubconf, name)).parameters.values()
        assert (pretrained.name, pretrained.default) == ("pretrained", True)
        assert keywords.kind is inspect.Parameter.VAR_KEYWORD
        assert "ImageNet" in getattr(hubconf, name).__doc__


def test_the_table_names_the_published_files():
    assert hubconf.BASE_URL == BASE
    for name, files in hubconf.PUBLISHED.items():
        stem, _, patch_size = PUBLISHED[name]
        start = f"{stem}_pretrain/{stem}"
        assert files["backbone"] == f"{start}_pretrain.pth"
        assert files["linear"] == f"{start}_linearweights.pth"
        assert files["full_checkpoint"] == f"{start}_pretrain_full_checkpoint.pth"
        assert files["patch_size"] == (None if "xcit" in name else patch_size)  # an XCiT's is part of `arch`
    attention, landmarks = "dino_deitsmall8_300ep_pretrain", "dino_vitsmall16_googlelandmark_pretrain"
    assert hubconf.PUBLISHED["dino_vits8"]["attention"] == f"{attention}/{attention}.pth"
    assert hubconf.PUBLISHED["dino_vits16"]["landmarks"] == f"{landmarks}/{landmarks}.pth"


# ---- weights ----


def test_each_entry_point_asks_for_its_own_file(monkeypatch):
    """The models are built on the meta device, and a ValueError ends each call at the download."""

    def download(url):
        raise ValueError(url)

    monkeypatch.setattr(hubconf, "_download", download)
    for name, (stem, _, _) in PUBLISHED.items():
        with torch.device("meta"), pytest.raises(ValueError, match="https") as asked:
            getattr(hubconf, name)()
        assert str(asked.value) == f"{BASE}{stem}_pretrain/{stem}_pretrain.pth"


def test_a_cached_file_is_loaded_without_a_network(cache, monkeypatch):
    vit = vits.vit_small(patch_size=16).eval()
    torch.save(vit.state_dict(), cache / "dino_deitsmall16_pretrain.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    images = tensor("images", (2, 3, 48, 32))
    with torch.no_grad():
        assert torch.equal(load("dino_vits16").eval()(images), vit(images))


@pytest.mark.parametrize("key", ["blocks.11.norm2.weight", "head.weight"])
def test_a_file_with_one_tensor_more_or_less_is_refused(published, key):
    published.state = vits.vit_small(patch_size=16).state_dict()
    if published.state.pop(key, None) is None:
        published.state[key] = torch.zeros(1000, 384)
    with pytest.raises(RuntimeError, match=re.escape(key)):
        hubconf.dino_vits16()


def published_layout(model):
    """An XCiT's state dict as its authors wrote it: another name for the positions, one matrix for class attention."""
    state, parts = {}, {}
    for key, value in model.state_dict().items():
        value = torch.randn_like(value) if value.is_floating_point() else value
        split = re.fullmatch(r"cls_attn_blocks\.(\d)\.attn\.([qkv])\.(weight|bias)", key)
        if split:
            parts.setdefault((split[1], split[3]), {})[split[2]] = value
        else:
            state[key.replace("pos_embed.", "pos_embeder.")] = value
    for (block, kind), three in parts.items():
        state[f"cls_attn_blocks.{block}.attn.qkv.{kind}"] = torch.cat([three[part] for part in "qkv"])
    return state


def test_published_xcit_weights_are_converted_as_timm_converts_them(published):
    xcit = pytest.importorskip("timm.models.xcit")
    model = hubconf.dino_xcit_small_12_p16(pretrained=False)
    published.state = published_layout(model)
    assert not set(published.state) >= set(model.state_dict())
    loaded = hubconf.dino_xcit_small_12_p16().state_dict()
    wanted = xcit.checkpoint_filter_fn(dict(published.state), model)
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in loaded.items())
    del published.state["cls_attn_blocks.1.attn.qkv.bias"]
    with pytest.raises(RuntimeError, match=r"cls_attn_blocks\.1\.attn\.[qkv]\.bias"):
        hubconf.dino_xcit_small_12_p16()


# ---- downloads; a file:// URL stands for the server ----


def test_a_file_is_downloaded_once(cache, tmp_path):
    torch.save({"a": torch.arange(5)}, tmp_path / "weights.pth")
    for _ in range(2):
        assert torch.equal(hubconf._download(f"file://{tmp_path}/weights.pth")["a"], torch.arange(5))
        (tmp_path / "weights.pth").unlink(missing_ok=True)
    assert [path.name for path in cache.iterdir()] == ["weights.pth"]


def test_a_failed_download_is_an_oserror_and_leaves_no_file(cache, tmp_path):
    with pytest.raises(OSError, match=r"missing\.pth"):
        hubconf._download(f"file://{tmp_path}/missing.pth")
    assert not list(cache.iterdir())


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("damage", ["cut short", "code"])
def test_an_unreadable_file_is_named_with_the_advice_to_delete_it_and_runs_no_code(cache, tmp_path, damage):
    path = cache / "weights.pth"
    torch.save({"a": Malicious(tmp_path / "canary") if damage == "code" else torch.arange(5000)}, path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OSError, match=f"{path} can't be read .*Delete it and try again"):
        hubconf._download("https://localhost:9/weights.pth")
    assert not (tmp_path / "canary").exists()
