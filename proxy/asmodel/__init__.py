"""asmodel serves LLM programs as models: ordinary Python keeps the state, models answer in small steps.

This is what an author of programs imports, and all of it.
"""

from asmodel.budget import Limits
from asmodel.calls import Document, LogLikelihood, Message, Reply, ToolCall, Usage
from asmodel.errors import AsmodelError, InvalidRequest, LimitExceeded, ProgramError, StepError, UpstreamError
from asmodel.gathering import gather
from asmodel.programs import Answer, Citation, Program, program
from asmodel.readers import canonical_json, thoughts_and_answer
from asmodel.run import Run
from asmodel.steps import Prompt, Step, score, step
from asmodel.tools import Tool, tool

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsmodelError",
    "Citation",
    "Document",
    "InvalidRequest",
    "LimitExceeded",
    "Limits",
    "LogLikelihood",
    "Message",
    "Program",
    "ProgramError",
    "Prompt",
    "Reply",
    "Run",
    "Step",
    "StepError",
    "Tool",
    "ToolCall",
    "UpstreamError",
    "Usage",
    "canonical_json",
    "gather",
    "program",
    "score",
    "step",
    "thoughts_and_answer",
    "tool",
]
