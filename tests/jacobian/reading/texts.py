"""Texts that the readers of formats are tested on: a good judgement, and anything a model may write."""

from hypothesis import settings
from hypothesis import strategies as st

GOOD = (
    "<specific_criteria>\nright\n</specific_criteria>\n<analysis>\nA is\n</analysis>\n"
    "<scores>\n\\boxed{9, 3}\n</scores>"
)
FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=300)
TAGS = ("<scores>", "</scores>", "<answer>", "</answer>", "</think>")
PIECES = (*TAGS, "\\boxed{", "{", "}", "\\}", ", ", "9", "٣", "NaN", "####")
ANY_TEXT = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=()), max_size=4)).map("".join)
