"""GetModel, Tokenize, Detokenize: the base's facts and what it sees."""

from chorus.v1 import inference_pb2, tasks_pb2
from services.fakes import FACTS
from services.harness import MakeRig, Rig, refused


async def test_model_tells_the_bases_facts(rig: Rig) -> None:
    model = await rig.inference.GetModel(inference_pb2.GetModelRequest())
    assert (model.name, model.digest, model.context_length, model.vocab_size) == ("tiny", FACTS.digest, 512, 257)
    assert (model.has_tokenizer, model.has_chat_template, model.max_rank) == (True, False, 128)
    assert [(site.name, site.in_features, site.out_features) for site in model.sites] == [
        ("model.layers.0.self_attn.q_proj", 16, 16)
    ]
    assert "Generate" in model.methods
    assert "Classify" not in model.methods


async def test_text_survives_tokenize_and_detokenize(rig: Rig) -> None:
    text = "größe 日本\n"
    tokens = await rig.inference.Tokenize(tasks_pb2.TokenizeRequest(text=text))
    assert list(tokens.token_ids) == list(text.encode())
    back = await rig.inference.Detokenize(tasks_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
    assert back.text == text


async def test_ids_outside_the_vocabulary_have_no_text(rig: Rig) -> None:
    seen = await refused(rig.inference.Detokenize(tasks_pb2.DetokenizeRequest(token_ids=[257])))
    assert (seen.code, list(seen.fields)) == ("INVALID_ARGUMENT", ["token_ids"])


async def test_base_without_tokenizer_says_so(make_rig: MakeRig) -> None:
    rig = await make_rig(tokenizer=None)
    seen = await refused(rig.inference.Tokenize(tasks_pb2.TokenizeRequest(text="x")))
    assert (seen.code, seen.reason) == ("FAILED_PRECONDITION", "NO_TOKENIZER")
    assert not (await rig.inference.GetModel(inference_pb2.GetModelRequest())).has_tokenizer
