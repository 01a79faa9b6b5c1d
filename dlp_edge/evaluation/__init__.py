"""Evaluates a bundle on tasks: compares systems by quality and time, and writes a report.

    from dlp_edge import Runtime
    from dlp_edge.evaluation import evaluate, read_eval_tasks, write_report
    with Runtime("bundle/") as rt:
        document = evaluate(rt, read_eval_tasks(Path("tasks")), Path("report"))
    write_report(document, Path("report"))

Needs the extra `eval`; the runtime does not depend on it.
"""

from dlp_edge.evaluation.evaluate import evaluate
from dlp_edge.evaluation.plan import EvalSettings
from dlp_edge.evaluation.report.write import write_report
from dlp_edge.evaluation.tasks import EvalTask, read_eval_tasks

__all__ = ["EvalSettings", "EvalTask", "evaluate", "read_eval_tasks", "write_report"]
