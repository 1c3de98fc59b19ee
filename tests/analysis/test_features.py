import pytest

from frankenmerge.analysis.features import Feature, check_features, check_single, parse_features
from frankenmerge.errors import FrankenmergeError

ALL = range(16)


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("[:, :, 3]", [Feature(2, range(3, 4))]),
        ("[:,:,0-2]", [Feature(2, range(f, f + 1)) for f in range(3)]),
        ("[:, :, 0:4]", [Feature(2, range(0, 4))]),
        ("[:, 1, 7]", [Feature(2, range(7, 8), range(1, 2))]),
        ("[:, 0 - 1, 7]", [Feature(2, range(7, 8), range(t, t + 1)) for t in range(2)]),
        ("[:, 0:2, :]", [Feature(2, ALL, range(0, 2))]),
        (
            "[:, 0-1, 2-3]",
            [Feature(2, range(f, f + 1), range(t, t + 1)) for t in (0, 1) for f in (2, 3)],
        ),
        (" [ :, :, : ] ", [Feature(2, ALL)]),
    ],
)
def test_notation(notation, expected):
    assert parse_features(notation, 2, 16) == expected


@pytest.mark.parametrize(
    "notation",
    [
        "",
        "[:, :]",
        "[0, :, 1]",
        "[:, :, a]",
        "[:, :, -1]",
        "[:, :, 4:4]",
        "[:, :, 4-2]",
        "[:, 3:1, 0]",
        ":, :, 1",
    ],
)
def test_other_notation_is_refused(notation):
    with pytest.raises(FrankenmergeError) as caught:
        parse_features(notation, 1, 16)
    assert caught.value.faults[0].found == notation
    assert all(caught.value.faults[0]) or not notation


@pytest.mark.parametrize("notation", ["[:, :, 3]", "[:, 1, 0:4]", "[:, 0:2, 5]"])
def test_written_as_read(notation):
    (feature,) = parse_features(notation, 2, 16)
    assert str(feature) == f"block 2 {notation}"


def test_every_impossible_feature_is_told_at_once():
    features = [
        Feature(5, range(0, 1)),
        Feature(1, range(14, 17)),
        Feature(1, range(3), range(4, 6)),
        Feature(2, range(14, 17)),
        Feature(4, ALL, range(5)),
    ]
    with pytest.raises(FrankenmergeError) as caught:
        check_features(features, blocks=4, width=16, tokens=5)
    places = [fault.place for fault in caught.value.faults]
    assert [place.split(": ")[1] for place in places] == ["block", "neuron", "position"]
    assert [fault.found for fault in caught.value.faults] == ["5", "14:17", "4:6"]
    assert all(all(fault) for fault in caught.value.faults)


def test_no_features_are_a_mistake():
    with pytest.raises(FrankenmergeError, match="at least one"):
        check_features([], blocks=4, width=16, tokens=5)


def test_a_feature_of_one_neuron():
    feature = Feature.of(2, 7)
    assert (feature, feature.neuron, feature.notation) == (Feature(2, range(7, 8)), 7, "[:, :, 7]")


def test_what_is_not_one_neuron_at_all_positions_is_told_with_the_reason():
    features = [
        Feature.of(1, 3),
        Feature(1, range(2, 4)),
        Feature(2, range(2, 4)),
        Feature(2, range(5, 6), range(1, 2)),
    ]
    check_single(features[:1], "because")
    with pytest.raises(FrankenmergeError) as caught:
        check_single(features, "because")
    faults = [(fault.place, fault.found, fault.remedy) for fault in caught.value.faults]
    assert faults == [
        ("[:, :, 2:4]", "several neurons", "because"),
        ("[:, 1, 5]", "chosen positions", "because"),
    ]
