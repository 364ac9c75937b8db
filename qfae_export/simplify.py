"""What is done to a traced model before it is written: constants folded, what says nothing taken out.

torch.onnx.export has onnxscript do this with all its rules. One of them looks for pairs of slices and compares every
slice with every node of the graph: on a model of full size that is half of the time of an export, and no graph of this
project has such a pair. So the same passes are run here with the rules that find something.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import (
    cast_cast_rule,
    materialize_reshape_shape_rule,
    max_min_rule,
    min_max_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
    reshape_reshape_rule,
    squeeze_reshape_1d_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)

_RULES = (
    materialize_reshape_shape_rule,
    min_max_rule,
    max_min_rule,
    cast_cast_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
    reshape_reshape_rule,
    squeeze_reshape_1d_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)

_ROUNDS = 2  # what one round takes out lets the next fold more


def simplify(model: ir.Model) -> None:
    """Simplify a traced model in place; it computes what it computed."""
    optimizer.inline(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, _RULES)
        optimizer.remove_unused_nodes(model)
        optimizer.remove_unused_functions(model)
    ir.passes.Sequential(
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
