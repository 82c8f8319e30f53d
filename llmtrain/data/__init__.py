"""From sources to what a trainer reads: documents -> splits -> tokens, and preference pairs.

    corpus.read_corpus ──splits.SplitCorpus──> tokenizer.train_bpe          prepare.prepare_tokenizer
                              └──────────────> text.ShardWriter             prepare.prepare_text
    preference_files.read_pairs ┐
    continuations (made of text)┴─pair_ids──> preferences.PairWriter        prepare_preferences.prepare_preferences

Training reads `text.TokenShards` and `preferences.PreferencePairs` in the order of `order.shuffled`.
"""
