"""What is public says what it takes and gives: no `Any` but where this file says why."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PASSED_ON = "passed on as they come to a function of a library, which types them"
ALLOWED = {
    "data_pipelines.movielens_like.write_movielens_archive": "fields of Generator, by keyword",
    "data_pipelines.synthetic.prepare_synthetic": "fields of Generator, by keyword",
    "data_pipelines.writer.SequenceWriter.finish": "fields of DatasetIdentity, by keyword",
    "fuxi_torchrec.checkpoint.reader.Reader.read_metadata": PASSED_ON,
    "fuxi_torchrec.checkpoint.reader.Reader.set_up_storage_reader": PASSED_ON,
    "fuxi_torchrec.checkpoint.storage.Files.create_stream": "a stream that counts, which DCP uses as an io.IOBase",
    "fuxi_torchrec.config.bounds.within": "as dataclasses.field: the key's own type stands beside it",
    "fuxi_torchrec.config.parsing.OneLineParser.__init__": PASSED_ON,
    "fuxi_torchrec.config.parsing.OneLineParser.add_argument": PASSED_ON,
    "fuxi_torchrec.config.parsing.OneLineParser.parse_path": PASSED_ON,
    "fuxi_torchrec.config.schema.section_of": "any of the sections' classes",
    "fuxi_torchrec.distributed.private_api.best_plan": "torchrec's planner, which has no types",
    "launch.kubernetes.scheduler.KubernetesScheduler.__init__": PASSED_ON,
    "launch.kubernetes.scheduler.create_scheduler": PASSED_ON,
    "launch.slurm.create_scheduler": PASSED_ON,
    "fuxi_torchrec.encoders.base.SequenceEncoder.batch_context": "each encoder's own, which its blocks alone read",
}


def public_functions(body, prefix):
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name in ("__init__", "__call__")):
            yield f"{prefix}.{node.name}", node


def holds_any(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    # The context of an autograd node is an object of torch's that takes any attribute.
    annotations = [argument.annotation for argument in named if argument is not None and argument.arg != "ctx"]
    words = " ".join(ast.unparse(annotation) for annotation in [*annotations, function.returns] if annotation is not None)
    return "Any" in words.replace("'", " ").replace("[", " ").replace("]", " ").replace(",", " ").split()


def test_public_signatures_hold_no_any_but_the_named_ones():
    found = set()
    for package in ("fuxi_torchrec", "data_pipelines", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            functions = public_functions(ast.parse(path.read_text(encoding="utf-8")).body, module)
            found |= {name for name, function in functions if holds_any(function)}
    assert found == set(ALLOWED), "give it a type, or say here why there is none"
