from tests.models import WIDTH
def test_x():
    assert WIDTH == 16
