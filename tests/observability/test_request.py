from observability.request import RequestEnded


def test_a_record_has_the_fields_it_tells_of_and_no_others():
    assert set(RequestEnded.__slots__) == set(RequestEnded.__annotations__)
    assert not hasattr(RequestEnded(), "__dict__")
