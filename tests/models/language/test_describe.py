"""Which of a small model's answers describe a label; the answers are SmolLM2-135M's own."""

from __future__ import annotations

import pytest
from edgefm.deploy.weights import WEIGHTS
from edgefm.models.language.decoder import Decoder
from edgefm.models.language.describe import SAMPLES, descriptions, requests
from edgefm.models.language.generate import generate_batch
from edgefm.models.language.tokenizer import tokenizer_of
from edgefm.models.language.weights import open_checkpoint
from edgefm.models.pool import MAX_DESCRIPTIONS, check_descriptions

WHEELCHAIR = (
    "A wheelchair is a wheelchair, a wheelchair, a wheelchair, a wheelchair, a wheelchair, a wheelchair, a wheelchair",
    "A wheelchair is a wheel, a person with a wheelchair, a wheel, a wheel, a wheel.",
    "A wheelchair is a wheelchair, a wheelchair, a wheelchair.",
    "A wheelchair is a wheelchair that has wheels.",
)


@pytest.mark.parametrize(
    ("label", "answers", "kept"),
    [
        ("hedgehog", ("A hedgehog is a small, furry animal with a white face and a black body.",) * 2, [0]),
        (
            "hedgehog",
            (
                "A hedgehog is a small, furry animal with a bushy head and a bushy tail.",
                "A hedgehog is a small furry animal with a bushy head and a bushy tail.",
            ),
            [0, 1],
        ),
        ("wheelchair", WHEELCHAIR, []),
        (
            "orange",
            (
                "A blue car with a red roof is a blue car with a blue roof.",  # the example, not the label
                "An orange is a fruit, a sweet red fruit with a sweet orange peel.",
                "A blue lemon is a lemon, a fruit with a red fruit.",
            ),
            [1],
        ),
        ("flightless bird in a tuxedo", ("A tuxedo is a luxurious high-end fashion brand.",), []),  # of one word of three
        ("sumac berries", ("A sumac berry is a type of berry that grows on a vine.",), [0]),  # in the singular
        ("grandma's seat on the porch", ("Grandma's seat on the porch is a grandma's seat on the porch.",), []),
        (
            "African elephant",
            (
                "The African elephant is a majestic creature with a wrinkled, black skin, a ring of white on its forehead, and a "
                "large, black body with a tusk protruding from its upper jaw. Its complex anatomy is",  # cut off
            ),
            ["The African elephant is a majestic creature with a wrinkled, black skin, a ring of white on its forehead, and a "
             "large, black body with a tusk protruding from its upper jaw."],
        ),
    ],
)  # fmt: skip
def test_answers_that_say_something_of_the_label_are_kept(label, answers, kept):
    assert descriptions(label, answers) == tuple(answers[i] if isinstance(i, int) else i for i in kept)


def test_a_list_is_taken_apart_and_talk_of_the_model_is_left_out():
    answer = (
        "Sure! Here is how I would describe a kayak:\n"
        "1. **A kayak is a narrow boat with pointed ends.** It is fun.\n"
        '- "A kayak has one open seat and a long paddle."\n'
        "\n* A kayak\n"
        "As an AI language model, I cannot see a kayak with pointed ends.\n"
        "A kayak in \x07 water with pointed ends.\n"
        f"A kayak is {'very ' * 2}{'long' * 50}.\n"
    )
    found = descriptions("kayak", [answer])
    assert found == (
        "A kayak is a narrow boat with pointed ends.",
        "A kayak has one open seat and a long paddle.",
    )
    assert descriptions("kayak", []) == descriptions("kayak", ["", "  \n \n"]) == ()


def test_requests_are_the_same_each_time_and_differ_in_their_seeds():
    asked = requests("sumac berries")
    assert asked == requests("sumac berries") and len(asked) == SAMPLES <= MAX_DESCRIPTIONS
    assert asked[0][1].temperature == 0 and len({sampling.seed for _, sampling in asked}) == SAMPLES
    assert all(messages[-1] == {"role": "user", "content": "sumac berries"} for messages, _ in asked)


def test_the_real_model_describes_a_hedgehog():
    path = WEIGHTS["smollm2"].path
    if not path.is_file():
        pytest.skip("no weights of SmolLM2 in the cache; edgefm weights get smollm2")
    checkpoint = open_checkpoint(path)
    tokenizer, decoder = tokenizer_of(checkpoint), Decoder(checkpoint, "quantised")
    messages, sampling = requests("hedgehog")[0]
    (answer,) = generate_batch(decoder, [tokenizer.chat(messages)], tokenizer.ends, [sampling])
    (text,) = descriptions("hedgehog", [tokenizer.decode(answer)])
    assert text.startswith("A hedgehog is a ") and check_descriptions("hedgehog", [text]) == (text,)
