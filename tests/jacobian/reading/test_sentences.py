"""Where sentences end, in any script: the last one is an answer, and numbers of sentences bound permutations."""

from itertools import pairwise

import pytest

from cepo.jacobian.reading.sentences import sentence_ends


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Two and two. So it is 4.", ["Two and two.", "So it is 4."]),
        ("It is 3.5 or so! Is it? Yes", ["It is 3.5 or so!", "Is it?", "Yes"]),
        ('He said "four." Then (again.) More', ['He said "four."', "Then (again.)", "More"]),
        ("二加二等于四。所以答案是四。", ["二加二等于四。", "所以答案是四。"]),
        ("「はい。」四です！本当？うん", ["「はい。」", "四です！", "本当？", "うん"]),
        ("نجمع اثنين واثنين؟ الجواب أربعة", ["نجمع اثنين واثنين؟", "الجواب أربعة"]),
        ("دو اور دو چار ہیں۔ جواب چار ہے۔", ["دو اور دو چار ہیں۔", "جواب چار ہے۔"]),
        ("दो और दो चार होते हैं। उत्तर चार है।", ["दो और दो चार होते हैं।", "उत्तर चार है।"]),
        ("३．५ और", ["३．५ और"]),
        ("２．５加１．５等于四．所以是４．", ["２．５加１．５等于四．", "所以是４．"]),
        ("ពីរបូកពីរស្មើបួន។ ចម្លើយគឺបួន។", ["ពីរបូកពីរស្មើបួន។", "ចម្លើយគឺបួន។"]),
        ("ᱵᱟᱨ ᱟᱨ ᱵᱟᱨ ᱯᱩᱱ᱾ ᱛᱮᱞᱟ ᱯᱩᱱ᱾", ["ᱵᱟᱨ ᱟᱨ ᱵᱟᱨ ᱯᱩᱱ᱾", "ᱛᱮᱞᱟ ᱯᱩᱱ᱾"]),
        ("Two and two make… four… So it is four", ["Two and two make…", "four…", "So it is four"]),
        ("Wait... what?! No", ["Wait...", "what?!", "No"]),
        ("Dr. No met J.K. Rowling at St. Ives, No. 46 of it", ["Dr. No met J.K. Rowling at St. Ives, No. 46 of it"]),
        ("11,\\! 111,\\! 100", ["11,\\! 111,\\! 100"]),
        ("one; two: three", ["one; two: three"]),
    ],
)
def test_sentences_end_in_any_script(text: str, sentences: list[str]) -> None:
    """Protects the last sentence as an answer: no white space follows a full stop in Chinese, and 3.5 holds none."""
    ends = [0, *sentence_ends(text), len(text)]
    assert [text[start:end].strip() for start, end in pairwise(ends)] == sentences


def test_clauses_count_on_demand() -> None:
    assert list(sentence_ends("one; two: 3:4. x", clauses=True)) == [4, 9, 14]
