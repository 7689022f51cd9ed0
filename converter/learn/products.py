"""Gradients of matrix products."""

from __future__ import annotations

from converter.learn.site import Rule, Site, by_input
from converter.learn.terms import Term


def matmul_left(site: Site) -> Term:
    """dy b'."""
    dy, _, right = _matrices(site)
    return _summed(dy.matmul(right.swapped()), site.x(0))


def matmul_right(site: Site) -> Term:
    """a' dy; a matrix that all products share is one product of all rows."""
    dy, left, right = _matrices(site)
    if right.rank == 2 and left.rank > 2:
        left, dy = (term.reshape(-1, term.shape[-1]) for term in (left, dy))
    return _summed(left.swapped().matmul(dy), site.x(1))


def _matrices(site: Site) -> tuple[Term, Term, Term]:
    """dy and both operands, vectors as the matrices that MatMul takes them for."""
    left, right = site.x(0), site.x(1)
    left = left.reshape(1, -1) if left.rank == 1 else left
    right = right.reshape(-1, 1) if right.rank == 1 else right
    batch = site.dy.shape[: max(left.rank, right.rank) - 2]
    return site.dy.reshape(*batch, left.shape[-2], right.shape[-1]), left, right


def _summed(product: Term, operand: Term) -> Term:
    """Over the products that shared the operand."""
    if operand.rank > 1:
        return product.sum_to(operand.shape)
    return product.sum(range(product.rank - 2)).reshape(*operand.shape)


def gemm_left(site: Site) -> Term:
    """alpha dy B', with A and B as the attributes turn them."""
    right = _turned(site, 1, "transB")
    found = _scaled(
        site.dy.matmul(right.swapped()),
        site.real("alpha", 1.0),
    )
    return found.swapped() if site.whole("transA", 0) else found


def gemm_right(site: Site) -> Term:
    """alpha A' dy, turned as B is, which is the order that costs no further step."""
    left, alpha = _turned(site, 0, "transA"), site.real("alpha", 1.0)
    if site.whole("transB", 0):
        return _scaled(site.dy.swapped().matmul(left), alpha)
    return _scaled(left.swapped().matmul(site.dy), alpha)


def gemm_bias(site: Site) -> Term:
    """beta dy, summed where the bias was broadcast."""
    return _scaled(
        site.dy.sum_to(site.x(2).shape),
        site.real("beta", 1.0),
    )


def _turned(site: Site, index: int, attribute: str) -> Term:
    return site.x(index).swapped() if site.whole(attribute, 0) else site.x(index)


def _scaled(term: Term, factor: float) -> Term:
    return term if factor == 1 else term * factor


RULES: dict[str, Rule] = {
    "MatMul": by_input(matmul_left, matmul_right),
    "Gemm": by_input(gemm_left, gemm_right, gemm_bias),
}
