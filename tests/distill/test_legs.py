"""On what a training ran, over its resumptions."""

from fewstep.distill.legs import Leg, cost, read_legs, up_to

H100 = Leg("H100", "cuda", 8)


def test_a_restart_on_the_same_devices_is_one_leg() -> None:
    legs = up_to((), H100, 10.0)
    assert legs == (Leg("H100", "cuda", 8, 10.0),)
    legs = up_to(legs, H100, 25.0)
    assert legs == (Leg("H100", "cuda", 8, 25.0),)
    assert cost(legs) == {"seconds": 25.0, "processes": 8, "device": "H100", "device_type": "cuda"}


def test_fewer_devices_cost_less() -> None:
    """10 s on 8 devices and 30 s on 2: 140 device-seconds, which neither 8 nor 2 times 40 s is."""
    legs = up_to(up_to((), H100, 10.0), Leg("H100", "cuda", 2), 40.0)
    assert [leg.seconds for leg in legs] == [10.0, 30.0]
    assert cost(legs) == {
        **{"seconds": 40.0, "processes": 2, "device": "H100", "device_type": "cuda"},
        "device_seconds": 140.0,
    }


def test_another_machine_is_named_beside_the_first() -> None:
    legs = up_to(up_to((), H100, 10.0), Leg("H200", "cuda", 8), 12.0)
    assert cost(legs) == {"seconds": 12.0, "processes": 8, "device": "H100, H200", "device_type": "cuda"}
    back = up_to(legs, H100, 13.0)
    assert len(back) == 3
    assert cost(back)["device"] == "H100, H200"
    assert cost(up_to(legs, Leg("a processor", "cpu", 8), 20.0))["device_type"] is None


def test_a_checkpoint_that_names_no_device_leaves_the_model_without() -> None:
    before = read_legs({"seconds": 7.0})
    told = cost(up_to(before, H100, 10.0))
    assert told == {"seconds": 10.0, "processes": 8}
    assert read_legs({"seconds": 7.0, "legs": [vars(H100)]}) == (H100,)
    assert cost(()) == {"seconds": 0}
