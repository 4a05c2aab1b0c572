"""cepo: exact d(score)/d(criteria) rewards for language-model judges and reasoners."""

__version__ = "0.1.0"
