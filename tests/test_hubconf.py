"""hubconf.py: the entry points build the right networks and load the right files, strictly."""

import hashlib
import http.server
import inspect
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, run_script, tensor

import hubconf
import vision_transformer as vits

BASE = "https://dl.fbaipublicfiles.com/dino/"
# name: (folder and stem of the backbone's file, width, patch size)
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
    """Stands in for the network: `published.state` is what every URL holds, `published.urls` what was asked for."""

    class Published:
        state, urls = None, []

    def download(url):
        Published.urls.append(url)
        return Published.state

    Published.urls = []
    monkeypatch.setattr(hubconf, "_download", download)
    return Published


@pytest.fixture(scope="module")
def vits16():
    return vits.vit_small(patch_size=16).eval()


@pytest.mark.parametrize("name", VITS)
def test_hub_builds_each_vit_without_the_network(name):
    model = load(name, pretrained=False)
    _, width, patch_size = PUBLISHED[name]
    assert (type(model).__name__, model.embed_dim, len(model.blocks)) == ("VisionTransformer", width, 12)
    assert model.patch_embed.patch_size == patch_size
    assert {block.attn.num_heads for block in model.blocks} == {width // 64}
    assert not [key for key in model.state_dict() if key.startswith("head")]


def test_hub_builds_resnet50_without_its_classifier():
    model = load("dino_resnet50", pretrained=False).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2048)
    assert not [key for key in model.state_dict() if key.startswith("fc")]


def test_hub_works_offline_and_imports_neither_timm_nor_a_module_called_utils():
    code = f"""
import json, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
del sys.path[0]  # the checkout, where python -c runs
import torch
for name in ("dino_vits16", "dino_resnet50"):
    torch.hub.load({str(ROOT)!r}, name, source="local", pretrained=False)
print(json.dumps(sorted(sys.modules)))
"""
    modules = json.loads(run_script("-c", code).stdout.splitlines()[-1])
    assert "vision_transformer" in modules
    assert not {"utils", "dino_data", "main_dino", "timm", "yaml"} & set(modules)


def test_pretrained_is_the_default_and_loads_what_was_published(published, vits16, tmp_path, monkeypatch):
    published.state = vits16.state_dict()
    hubconf.dino_vits16()
    assert published.urls == [BASE + "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # torch.hub imports a hubconf of its own
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(vits16.state_dict(), tmp_path / "hub" / "checkpoints" / "dino_deitsmall16_pretrain.pth")
    model = load("dino_vits16").eval()
    images = tensor("images", (2, 3, 48, 32))
    with torch.no_grad():
        assert torch.equal(model(images), vits16(images))


def test_published_resnet_has_no_classifier_and_loads_strictly(published):
    state = hubconf.dino_resnet50(pretrained=False).state_dict()
    published.state = {key: torch.full_like(value, 2) for key, value in state.items()}
    model = hubconf.dino_resnet50()
    assert published.urls == [BASE + "dino_resnet50_pretrain/dino_resnet50_pretrain.pth"]
    assert all((value == 2).all() for value in model.state_dict().values())


@pytest.mark.parametrize("change", ["lacks", "adds"])
def test_a_file_with_one_tensor_more_or_less_is_refused(published, vits16, change):
    published.state = dict(vits16.state_dict())
    if change == "lacks":
        del published.state["blocks.11.norm2.weight"]
    else:
        published.state["head.weight"] = torch.zeros(1000, 384)
    with pytest.raises(RuntimeError, match=r"blocks\.11\.norm2\.weight|head\.weight"):
        hubconf.dino_vits16()


def test_without_pretraining_nothing_is_downloaded(published):
    hubconf.dino_vits16(pretrained=False)
    assert published.urls == []


def test_every_entry_point_asks_for_its_own_file(monkeypatch):
    """Builds on the meta device; a ValueError stands for the download."""

    def download(url):
        raise ValueError(url)

    monkeypatch.setattr(hubconf, "_download", download)
    for name in hubconf.PUBLISHED:
        stem = PUBLISHED[name][0]
        with torch.device("meta"), pytest.raises(ValueError, match="https") as asked:
            getattr(hubconf, name)()
        assert str(asked.value) == f"{BASE}{stem}_pretrain/{stem}_pretrain.pth"


def test_the_table_has_the_published_backbones():
    assert set(hubconf.PUBLISHED) == set(PUBLISHED)


def test_the_table_names_the_networks_that_were_published_for_one_purpose():
    files = hubconf.PUBLISHED
    attention, landmarks = "dino_deitsmall8_300ep_pretrain", "dino_vitsmall16_googlelandmark_pretrain"
    assert files["dino_vits8"]["attention"] == f"{attention}/{attention}.pth"
    assert files["dino_vits16"]["landmarks"] == f"{landmarks}/{landmarks}.pth"


def test_the_table_names_the_three_published_files_of_each_backbone():
    assert hubconf.BASE_URL == BASE
    for name, files in hubconf.PUBLISHED.items():
        stem, _, patch_size = PUBLISHED[name]
        folder = f"{stem}_pretrain/{stem}"
        assert files["backbone"] == f"{folder}_pretrain.pth"
        assert files["linear"] == f"{folder}_linearweights.pth"
        assert files["full_checkpoint"] == f"{folder}_pretrain_full_checkpoint.pth"
        assert files["patch_size"] == (None if "xcit" in name else patch_size)  # there it is part of `arch`


@pytest.mark.parametrize("name", VITS)
def test_keywords_reach_the_vit(name):
    with torch.device("meta"):
        model = load(name, pretrained=False, drop_path_rate=0.2, img_size=[96])
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.pos_embed.shape[1] == 1 + (96 // PUBLISHED[name][2]) ** 2


def test_torch_hub_lists_the_entry_points_alone():
    public = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert sorted(public) == sorted(hubconf.PUBLISHED)


def test_keywords_reach_the_resnet():
    dilated = load("dino_resnet50", pretrained=False, replace_stride_with_dilation=[False, False, True])
    assert dilated.layer4[0].conv2.stride == (1, 1)
    assert dilated.layer4[1].conv2.dilation == (2, 2)


# ---- XCiT ----


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


def test_published_xcit_weights_become_what_timm_makes_of_them(published):
    from timm.models import xcit

    model = hubconf.dino_xcit_small_12_p16(pretrained=False)
    published.state = published_layout(model)
    assert not set(published.state) >= set(model.state_dict())
    loaded = hubconf.dino_xcit_small_12_p16().eval()
    stem = PUBLISHED["dino_xcit_small_12_p16"][0]
    assert published.urls == [f"{BASE}{stem}_pretrain/{stem}_pretrain.pth"]
    wanted = xcit.checkpoint_filter_fn(dict(published.state), model)
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in loaded.state_dict().items())


def test_an_xcit_file_that_lacks_a_tensor_is_refused(published):
    published.state = published_layout(hubconf.dino_xcit_small_12_p16(pretrained=False))
    del published.state["cls_attn_blocks.1.attn.qkv.bias"]
    with pytest.raises(RuntimeError, match=r"cls_attn_blocks\.1\.attn\.[qkv]\.bias"):
        hubconf.dino_xcit_small_12_p16()


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "xcit" in name])
def test_hub_builds_each_xcit_and_passes_keywords_on(name):
    model = load(name, pretrained=False, drop_path_rate=0.25).eval()
    _, width, patch_size = PUBLISHED[name]
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 32)).shape == (1, width)
    assert model.patch_embed.patch_size == patch_size
    assert len(model.blocks) == (24 if "24" in name else 12)
    assert {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"} == {0.25}


def test_without_timm_an_xcit_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        hubconf.dino_xcit_small_12_p8(pretrained=False)
    assert hubconf.dino_vits16(pretrained=False).embed_dim == 384


# ---- downloads ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Key and certificate of 127.0.0.1 in one file."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the server's certificate")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path) + ".key"]
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-out", str(path)]
    subprocess.run(["openssl", "req", "-x509", *key, *name], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_name(path.name + ".key").read_bytes())
    return path


@pytest.fixture
def server(tmp_path, monkeypatch, certificate):
    """A web server whose one file may be cut short: server(content, sent) -> its URL. The cache is a fresh folder.

    With `moved_to` it says that the file is there; with `pause` it stops for so long before the last byte.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    running = []

    def serve(content, sent=None, scheme="https", name="weights.pth", moved_to=None, pause=0):
        class Handler(http.server.BaseHTTPRequestHandler):
            asked = 0

            def do_GET(self):
                Handler.asked += 1
                self.send_response(302 if moved_to else 200)
                self.send_header(*(("Location", moved_to) if moved_to else ("Content-Length", str(len(content)))))
                self.end_headers()
                self.wfile.write(content[: sent or -1])
                time.sleep(pause)
                self.wfile.write(content[-1:] if sent is None else b"")

            def log_message(self, *_):
                pass

        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        running[-1].handle_error = lambda *_: None  # of clients that go away
        if scheme == "https":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            running[-1].socket = context.wrap_socket(running[-1].socket, server_side=True)
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"{scheme}://127.0.0.1:{running[-1].server_port}/{name}", Handler

    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_download_is_kept_and_asked_for_once(server):
    url, handler = server(saved({"a": torch.arange(5000)}))
    for _ in range(2):
        assert torch.equal(hubconf._download(url)["a"], torch.arange(5000))
    assert handler.asked == 1


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_download_that_was_cut_short_is_an_error_and_does_not_stay(server, tmp_path, share):
    content = saved({"a": torch.arange(5000)})
    url, _ = server(content, sent=int(share * len(content)))
    with pytest.raises(OSError, match=rf"did not arrive whole \({int(share * len(content))} of {len(content)} bytes"):
        hubconf._download(url)
    assert not files_in(tmp_path / "cache")


def test_nothing_is_asked_for_over_http(server, tmp_path):
    url, handler = server(saved({}), scheme="http")
    with pytest.raises(OSError, match=f"{url} is not https"):
        hubconf._download(url)
    assert handler.asked == 0
    assert not files_in(tmp_path / "cache")


def test_a_redirection_to_http_is_not_followed_and_one_to_https_is(server, tmp_path):
    content = saved({"a": torch.arange(3)})
    open_url, open_handler = server(content, scheme="http")
    url, _ = server(b"", moved_to=open_url)
    with pytest.raises(OSError, match=f"{open_url} is not https"):
        hubconf._download(url)
    assert open_handler.asked == 0
    assert not files_in(tmp_path / "cache")
    url, _ = server(b"", moved_to=server(content)[0])
    assert torch.equal(hubconf._download(url)["a"], torch.arange(3))


def test_a_server_that_nobody_vouches_for_is_not_believed(server, tmp_path, monkeypatch):
    url, handler = server(saved({}))
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(OSError, match="certificate"):
        hubconf._download(url)
    assert handler.asked == 0


def test_a_name_that_carries_a_hash_is_held_against_what_arrives(server, tmp_path):
    content = saved({"a": torch.arange(3)})
    digest = hashlib.sha256(content).hexdigest()
    url, _ = server(content, name=f"weights-{digest[:8]}.pth")
    assert torch.equal(hubconf._download(url)["a"], torch.arange(3))
    url, _ = server(content, name="weights-0123abcd.pth")
    with pytest.raises(OSError, match=f"SHA-256 of what arrived is {digest}"):
        hubconf._download(url)
    assert [path.name for path in files_in(tmp_path / "cache")] == [f"weights-{digest[:8]}.pth"]


def test_a_download_that_is_killed_leaves_nothing_that_is_taken_for_the_file(server, tmp_path):
    content = saved({"a": torch.arange(5000)})
    url, handler = server(content, pause=3)
    code = f"import hubconf; hubconf._download({url!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    process.stderr.readline()  # what it says before the first byte
    process.kill()
    process.wait()
    process.stderr.close()
    assert "weights.pth" not in [path.name for path in files_in(tmp_path / "cache")]
    url, handler = server(content)
    assert torch.equal(hubconf._download(url)["a"], torch.arange(5000))
    assert handler.asked == 1


def test_a_download_that_would_run_code_does_not_and_does_not_stay(server, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    url, _ = server(saved({"a": Malicious()}))
    with pytest.raises(OSError, match="was removed"):
        hubconf._download(url)
    assert not (tmp_path / "canary").exists()
    assert not files_in(tmp_path / "cache")


def test_every_entry_point_of_the_table_is_a_documented_function_with_pretrained_first():
    for name in hubconf.PUBLISHED:
        entry = getattr(hubconf, name)
        pretrained, keywords = inspect.signature(entry).parameters.values()
        assert (pretrained.name, pretrained.default) == ("pretrained", True)
        assert keywords.kind is inspect.Parameter.VAR_KEYWORD
        assert "ImageNet" in entry.__doc__


def test_dependencies_are_what_hub_has_to_find():
    assert {"torch", "torchvision"} == set(hubconf.dependencies)
