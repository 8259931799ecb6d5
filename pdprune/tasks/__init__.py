"""What a circuit is asked to do: prompts with right and wrong answers, and running text."""

from pdprune.tasks.data import TaskBatch, TaskData
from pdprune.tasks.prompts import Prompt, Window, read_task, shipped_tasks

__all__ = ["Prompt", "TaskBatch", "TaskData", "Window", "read_task", "shipped_tasks"]
