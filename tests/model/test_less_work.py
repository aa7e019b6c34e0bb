"""What training leaves out: dropped samples that are not computed, patches, activations."""

from functools import partial
from typing import Any

import pytest
import torch
from conftest import user_error
from test_family import images_for, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitlit.model import ViT
from vitlit.objectives import MAE
from vitlit.stages import Finetune

BATCH = 20


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def last_block(**options: Any) -> Any:
    return tiny(drop_path=0.3, drop_path_subset=True, **options).blocks[-1]


def only_mlp(block: Any) -> Any:
    """The block without attention, so that what a sample gets is from one branch."""
    with torch.no_grad():
        for parameter in block.attn.proj.parameters():
            parameter.zero_()
    return block


def flops(module: nn.Module, x: Tensor) -> int:
    """Of a training step."""
    with FlopCounterMode(display=False) as counter:
        module.train()(x).sum().backward()
    return int(counter.get_total_flops())


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "distilled": {"distilled": True},
    "registers, norms, factors": {"registers": 2, "qk_norm": True, "sub_norm": True, "layer_scale": 0.5},
    "rope": {"position": "rope", "norm": "pooled"},
    "recomputed": {"activation_checkpointing": 1},
    "one block": {"depth": 1},
    "mean": {"pool": "gap", "class_token": True},
    "attention": {"pool": "map"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_are_those_of_all_tokens(options: dict[str, Any]) -> None:
    vit = tiny(**options).double().train()
    images = images_for(vit).double()

    def gradients(logits: Tensor) -> list[Tensor]:
        return [logits, *torch.autograd.grad(logits.square().sum(), [*vit.parameters()])]

    logits, distilled, _ = vit.heads(vit.features(images))
    expected = gradients(logits if distilled is None else (logits + distilled) / 2)
    torch.testing.assert_close(gradients(vit(images)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("subset", [False, True])
def test_stochastic_depth_drops_the_same_where_only_the_class_token_comes_out(subset: bool) -> None:
    vit = tiny(drop_path=0.5, drop_path_subset=subset).double().train()
    images = images_for(vit, BATCH).double()
    torch.manual_seed(1)
    expected = vit.head(vit.pool(vit.features(images)))
    torch.manual_seed(1)
    torch.testing.assert_close(vit(images), expected, rtol=1e-9, atol=1e-12)


def test_the_last_block_computes_the_class_token_alone() -> None:
    # 12 D^2 multiply-adds a token and block, and attention's 2 tokens x D: for N of N + 1 tokens the last block does
    # without the 9 D^2 of its projection and MLP, and without what they attend to.
    options = {"image_size": 32, "patch_size": 8, "width": 64, "depth": 4, "mlp_dim": 256, "heads": 4}
    vit, images = ViT(**options, num_classes=5), torch.randn(1, 3, 32, 32)
    whole, part = (FlopCounterMode(display=False) for _ in range(2))
    with whole, torch.no_grad():
        vit.head(vit.pool(vit.features(images)))
    with part, torch.no_grad():
        vit(images)
    assert whole.get_total_flops() - part.get_total_flops() == 2 * 16 * (9 * 64**2 + 2 * 17 * 64)


def test_a_fixed_number_of_random_samples_gets_the_branch_scaled_to_the_same_mean() -> None:
    block, x = only_mlp(last_block()), torch.randn(1, 3, 24)
    alone = (block.eval()(x) - x).detach()
    counts = torch.zeros(BATCH)
    for _ in range(300):
        added = (block.train()(x.expand(BATCH, -1, -1)) - x).detach()
        kept = (added != 0).any(dim=2).any(dim=1)
        assert kept.sum() == 14  # 20 x (1 - 0.3)
        torch.testing.assert_close(added[kept], (alone * 20 / 14).expand(14, -1, -1), rtol=0, atol=1e-5)
        counts += kept
    assert (counts / 300 - 0.7).abs().max() < 0.12  # 4.5 standard deviations


def test_a_sample_that_is_dropped_passes_its_gradient_on_unchanged_and_gives_none_to_the_branch() -> None:
    block = only_mlp(last_block()).train()
    x = torch.randn(BATCH, 3, 24, requires_grad=True)
    out = block(x)
    dropped = (out == x).all(dim=2).all(dim=1)
    assert dropped.sum() == 6
    upstream = torch.randn_like(out) * dropped[:, None, None]
    gradients = torch.autograd.grad(out, [x, *block.mlp.parameters()], upstream)
    assert torch.equal(gradients[0], upstream)
    assert all(not gradient.any() for gradient in gradients[1:])


def test_one_sample_is_always_left() -> None:
    block, x = last_block(), torch.randn(1, 3, 24)
    assert torch.equal(block.train()(x), block.eval()(x))


def test_what_is_dropped_is_not_computed() -> None:
    x = torch.randn(BATCH, 3, 24, requires_grad=True)
    by_chance, subset = tiny(drop_path=0.3).blocks[-1], last_block()
    assert flops(subset, x) / flops(by_chance, x) == pytest.approx(0.7)
    assert flops(subset, x[:1]) == flops(by_chance, x[:1])


def test_rotary_positions_are_those_of_the_samples_that_are_kept() -> None:
    block = last_block(position="rope")
    with torch.no_grad():
        for parameter in block.mlp.fc2.parameters():
            parameter.zero_()
    x, angles = torch.randn(BATCH, 3, 24), torch.rand(BATCH, 1, 3, 24 // block.attn.heads)
    rotary = angles.cos(), angles.sin()  # as if each image had kept patches of its own
    added = block.train()(x, rotary) - x
    alone = (block.eval()(x, rotary) - x) * 20 / 14
    kept = added.flatten(1).any(1)
    assert kept.sum() == 14
    torch.testing.assert_close(added[kept], alone[kept], rtol=0, atol=1e-5)


def test_patch_dropout_leaves_out_a_share_of_the_patches_with_their_positions() -> None:
    vit = tiny(patch_dropout=0.4)
    images, patches = images_for(vit, batch=3), vit.grid[0] * vit.grid[1]
    kept = int(patches * 0.6)
    whole = vit.embed(images)
    assert vit.features(images).shape[1] == vit.prefix + patches
    tokens: list[Tensor] = []
    vit.get_submodule("blocks.0").register_forward_pre_hook(lambda module, arguments: tokens.append(arguments[0]))
    assert vit.train().features(images).shape[1] == vit.prefix + kept
    vit.features(images)
    first, second = tokens
    assert torch.equal(first[:, : vit.prefix], whole[:, : vit.prefix])
    for found, image in zip(first, whole, strict=True):
        rows = (found[vit.prefix :, None] == image[None, vit.prefix :]).all(-1)
        assert torch.equal(rows.sum(1), torch.ones(kept))  # each is one of the image's
        assert rows.any(0).sum() == kept  # and none comes twice
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    logits = vit(images)
    torch.manual_seed(1)
    assert torch.equal(vit(images), logits)


def test_patch_dropout_saves_the_blocks_work() -> None:
    whole, part = tiny(image_size=(32, 32)), tiny(image_size=(32, 32), patch_dropout=0.5)
    assert flops(part, images_for(part)) < 0.65 * flops(whole, images_for(whole))


def test_a_frozen_encoder_sees_every_patch() -> None:
    vit = ViT(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32, patch_dropout=0.5)
    stage = Finetune(vit=vit, num_classes=4, freeze=True, optimizer=partial(torch.optim.SGD, lr=0.1)).train()
    assert stage.vit.features(torch.randn(2, 3, 16, 16)).shape[1] == 5


def test_mae_which_hides_patches_itself_refuses_patch_dropout() -> None:
    user_error("leave model.vit.patch_dropout out", MAE, tiny(patch_dropout=0.1))


@pytest.mark.parametrize(("every", "calls"), [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (3, [2, 1, 1, 2])])
def test_every_so_many_blocks_are_computed_twice_and_keep_less(every: int, calls: list[int]) -> None:
    plain, saving = (tiny(depth=4, pool="gap", activation_checkpointing=each) for each in (0, every))
    saving.load_state_dict(plain.state_dict())
    images, sizes = images_for(plain, batch=4), []
    for vit in (plain, saving):
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        seen: list[nn.Module] = []
        for block in vit.blocks:
            block.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = F.cross_entropy(vit.train()(images), torch.tensor([0, 1, 2, 3]))
        sizes.append(size)
        loss.backward()
        assert [seen.count(block) for block in vit.blocks] == (calls if vit is saving else [1] * 4)
    assert sizes[1] < sizes[0] * (1 - 0.7 * sum(count == 2 for count in calls) / 4)
    for mine, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(torch.as_tensor(mine.grad), torch.as_tensor(theirs.grad))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_the_step_compiles_as_one_graph(position: str) -> None:
    vit = tiny(drop_path=0.5, drop_path_subset=True, patch_dropout=0.5, position=position).train()
    images = images_for(vit, batch=4)
    torch.manual_seed(3)
    expected = vit(images)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.compile(vit, fullgraph=True, backend="eager")(images), expected)
