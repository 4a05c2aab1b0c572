"""An item of the testbed that was worked out by hand, and the form of its completions."""

import re

from cepo.train.testbed import Item

FORMAT = re.compile(
    r"<specific_criteria>\njudge by (\w+) of the answer\n</specific_criteria>\n"
    r"<analysis>\nA shows (\w+) and B shows (\w+)\n</analysis>\n"
    r"<scores>\n\\boxed\{([1-9]), ([1-9])\}\n</scores>"
)
PROMPT = (
    "Query: help with this audit\n"
    "Response A: rude correct so lucid shallow careful clumsy\n"
    "Response B: lucid wrong elegant gentle thorough reckless so so well"
)
ITEM = Item(PROMPT, "judge by accuracy of the answer", "A shows correct and B shows wrong", (8, 3), "A", "accuracy")
