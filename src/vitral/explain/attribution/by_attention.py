"""Methods that read attention and its gradient: the raw row, rollout and its relatives, LeGrad.

Rollout and its relatives multiply a (T, T) matrix of each layer and read one row of the product. Only that
row is carried here, r <- r + r A_l from the last layer to the first, so that no two matrices are ever
multiplied. Axes are those of `model/embedding.py`; the last layer's Q are the tokens that the head reads.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from vitral.explain.attribution.method import Found, Subject
from vitral.explain.observe import Pass, SeenAttention, frozen, observe, start_row


@torch.no_grad()
def raw_attention(subject: Subject) -> Found:
    """Where the tokens that the head reads look in the last layer: A, mean over heads.

    For attention pooling it is the pool's own row, as no later attention stands before the head.
    """
    last = len(subject.model.layers) - 1
    seen = _forward(subject, lambda _, layer: _mean_attention(layer), layers=[last])
    row_BT = start_row(subject.model, seen)
    if subject.model.config.pooling == "map":
        return Found(row_BT, seen.logits_BL)
    weights_BQT, certificate = seen.taken[last]
    return Found(_through(row_BT, weights_BQT), seen.logits_BL, certificate)


@torch.no_grad()
def rollout(subject: Subject) -> Found:
    """Attention rollout (arXiv:2005.00928, §3): a row of the product of all layers' (mean_h A_l + I) / 2."""
    seen = _forward(subject, lambda _, layer: _mean_attention(layer))
    layers = [seen.taken[index] for index in range(len(seen.taken))]
    row_BT = _row_of_product(subject, seen, (weights_BQT for weights_BQT, _ in reversed(layers)))
    return Found(row_BT, seen.logits_BL, max(certificate for _, certificate in layers))


def gradient_rollout(subject: Subject) -> Found:
    """Rollout of relu(mean_h A * dA), each row of its mean with I divided by its sum.

    The much copied code of vit-explain pairs a layer's A with another layer's gradient (its issue 6), and
    divides columns where it means rows (issue 16); this is what it means to compute.
    """
    return _row_of_gradients(subject, lambda products: _mean(products).relu_())


def attention_gradient(subject: Subject) -> Found:
    """Attention x gradient (arXiv:2103.15679, eq. 5 and 6): r <- r + r mean_h relu(A_l * dA_l)."""
    return _row_of_gradients(
        subject, lambda products: _mean(product.relu_() for product in products), normalized=False
    )


def legrad(subject: Subject) -> Found:
    """LeGrad (arXiv:2404.03214, §3): relu of the gradient of A_l, mean over layers, heads and queries.

    The gradient of layer l is that of s_l, what the model's own pool and head say of the tokens that leave
    layer l; so it passes no other layer. The authors' code for CLIP takes the mean of all tokens to the head.
    """
    model = subject.model
    with frozen(model), torch.enable_grad(), subject.classifier.placement.autocast():
        seen = observe(model, subject.images_BCHW, all_queries=False)
        question = subject.ask(seen.logits_BL)
        scores = [question.scores(_head_of(subject, tokens_BTD)).sum() for tokens_BTD in seen.outputs]
    map_BT = torch.zeros(seen.embedded_BTD.shape[:2], device=seen.logits_BL.device)
    for index, score in enumerate(scores):
        layer: SeenAttention = seen.taken[index]
        (of_mixed_BAQK,) = torch.autograd.grad(score, layer.mixed_BAQK, retain_graph=True)
        map_BT += _positive_gradient(layer, of_mixed_BAQK[:, :, : model.num_tokens_read])
    return Found(map_BT / (len(scores) * map_BT.shape[1]), seen.logits_BL.detach())


# --- One pass --------------------------------------------------------------------------------------


def _forward(
    subject: Subject, take: Callable[[int, SeenAttention], object], layers: list[int] | None = None
) -> Pass:
    with subject.classifier.placement.autocast():
        return observe(
            subject.model, subject.images_BCHW, take, layers=layers, all_queries=False, keep_outputs=False
        )


def _row_of_gradients(
    subject: Subject, fuse: Callable[[Iterator[Tensor]], Tensor], *, normalized: bool = True
) -> Found:
    """A row of a product over layers; `fuse` makes a layer's matrix of its heads' A * dA, (B, Q, T) each."""
    model = subject.model
    with frozen(model), torch.enable_grad(), subject.classifier.placement.autocast():
        seen = observe(model, subject.images_BCHW, all_queries=False)
        score = subject.ask(seen.logits_BL).scores(seen.logits_BL).sum()
    layers: list[SeenAttention] = [seen.taken[index] for index in range(len(seen.taken))]
    gradients = torch.autograd.grad(score, [layer.mixed_BAQK for layer in layers])
    with torch.no_grad():
        matrices = (
            fuse(_products(layer, of_mixed_BAQK))
            for layer, of_mixed_BAQK in zip(reversed(layers), reversed(gradients), strict=True)
        )
        row_BT = _row_of_product(subject, seen, matrices, normalized=normalized)
        differences = [layer.difference(layer.weights(slice(1)), slice(1)) for layer in layers]
        certificate = float(torch.stack(differences).max())
    return Found(row_BT, seen.logits_BL.detach(), certificate)


def _row_of_product(
    subject: Subject, seen: Pass, matrices_BQT: Iterable[Tensor], *, normalized: bool = True
) -> Tensor:
    """The row that the head reads of the product of all layers' M + I, last layer first: (B, T).

    What prefix tokens get leaves out what they keep of themselves, layer by layer: that a class token is
    relevant to itself says nothing of it.

    Args:
        subject: the images.
        seen: the pass.
        matrices_BQT: M of each layer, last to first; rows beyond the queries are zero.
        normalized: divide each row of M + I by its sum.
    """
    kept_BT = start_row(subject.model, seen)
    row_BT = kept_BT.clone()
    for weights_BQT in matrices_BQT:
        if normalized:
            asked, sums_BQ = weights_BQT.shape[1], 1 + weights_BQT.sum(dim=2)
            row_BT[:, :asked] /= sums_BQ
            kept_BT[:, :asked] /= sums_BQ
        row_BT = row_BT + _through(row_BT, weights_BQT)
    prefix = subject.model.config.num_prefix_tokens
    row_BT[:, :prefix] -= kept_BT[:, :prefix]
    return row_BT


def _head_of(subject: Subject, tokens_BTD: Tensor) -> Tensor:
    """What the head says of the tokens that leave some layer: (B, T, D) -> (B, L)."""
    model = subject.model
    return model.classify(model.norm(tokens_BTD[:, : model.num_tokens_read]))


# --- One layer -------------------------------------------------------------------------------------


def _mean_attention(layer: SeenAttention) -> tuple[Tensor, float]:
    """A, mean over heads, (B, Q, T); and its certificate."""
    differences: list[Tensor] = []

    def heads() -> Iterator[Tensor]:
        for head in layer.each_head():
            weights_B1QT = layer.weights(head)
            differences.append(layer.difference(weights_B1QT, head))
            yield weights_B1QT[:, 0]

    mean_BQT = _mean(heads())
    return mean_BQT, float(torch.stack(differences).max())


def _products(layer: SeenAttention, of_mixed_BAQK: Tensor) -> Iterator[Tensor]:
    """A * dA of each head: (B, Q, T)."""
    for head in layer.each_head():
        yield layer.weights(head).mul_(layer.gradient(of_mixed_BAQK, head))[:, 0]


def _mean(heads: Iterable[Tensor]) -> Tensor:
    """The mean, of which one head beside the sum is alive at a time."""
    heads = iter(heads)
    total, count = next(heads), 1
    for head in heads:
        total = total.add_(head)
        count += 1
    return total.div_(count)


def _positive_gradient(layer: SeenAttention, of_mixed_BAQK: Tensor) -> Tensor:
    """relu(dA), mean over heads and summed over queries: (B, T)."""
    parts = [layer.gradient(of_mixed_BAQK, head).relu_().sum(dim=(1, 2)) for head in layer.each_head()]
    return torch.stack(parts).mean(0)


def _through(row_BT: Tensor, weights_BQT: Tensor) -> Tensor:
    """The row times a layer's matrix, whose rows beyond the queries are zero: (B, T)."""
    return (row_BT[:, None, : weights_BQT.shape[1]] @ weights_BQT)[:, 0]
