from moe_jax.config import DataConfig, ModelConfig, TrainConfig


def test_the_vocabulary_comes_from_the_tokenizer_unless_set():
    assert TrainConfig(data=DataConfig(tokenizer="bytes")).resolved().model.vocabulary == 258
    config = TrainConfig(data=DataConfig(tokenizer="bpe:512"), model=ModelConfig(vocabulary=1024))
    assert config.resolved().model.vocabulary == 1024


def test_resolving_sets_the_vocabulary_once_and_nothing_else():
    config = TrainConfig(data=DataConfig(tokenizer="bytes"), steps=7)
    resolved = config.resolved()
    assert resolved == TrainConfig(
        data=DataConfig(tokenizer="bytes"), steps=7, model=ModelConfig(vocabulary=258)
    )
    assert resolved.resolved() == resolved
