"""Exported programs of a fused network: the unfused form, as the library has it, and the model stays fused."""

from __future__ import annotations

import io

import pytest
import torch

import densenet_ext as dx
from tests.support.fusing_helpers import assert_same_state, images, net, pair


def test_an_exported_program_takes_other_batches_and_loads_again() -> None:
    model = dx.fuse(net()).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for n in (2, 5):
        torch.testing.assert_close(again(images(n)), model(images(n)))
    assert all(row.fused for row in dx.report(model))


def test_export_in_training_has_gradients_and_moves_statistics() -> None:
    models = [torch.export.export(model, (images(),)).module() for model in pair()]
    for model in models:
        model(images()).square().mean().backward()
    assert_same_state(*models)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_onnx_has_the_usual_operations() -> None:
    pytest.importorskip("onnxscript")
    model = dx.fuse(net()).float().eval()
    program = torch.onnx.export(model, (images().float(),), dynamo=True, verbose=False)
    assert program is not None
    kinds = {(node.domain, node.op_type) for node in program.model.graph}
    assert {domain for domain, _ in kinds} == {""} and ("", "Concat") in kinds and ("", "Conv") in kinds
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(program.model_proto)
    (got,) = evaluator.run(None, {evaluator.input_names[0]: images().float().cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(images().float()).cpu(), rtol=1e-4, atol=1e-5)
    assert all(row.fused for row in dx.report(model))
