"""From sources to what a trainer reads: documents -> splits -> tokens, preference pairs and votes, chats.

    corpus.read_corpus ──splits.SplitCorpus──> tokenizer.train_bpe          prepare.prepare_tokenizer
                              └──────────────> text.ShardWriter             prepare.prepare_text
    preference_files.read_pairs, read_votes ┐
    continuations (made of text) ───────────┴─pair_ids──> preferences.PairWriter
                                                                            prepare_preferences.prepare_preferences
    chat_files.read_chats ──────────────────┐
    docstring_chats (made of the library) ──┴─chat_template, chats.chat_ids──> chats.ChatWriter
                                                                            prepare_chats.prepare_chats

Training reads `text.TokenShards`, `preferences.PreferencePairs` (as votes: `votes.votes`) and `chats.ChatRows` in the
order of `order.shuffled`; `packing` says what shares a row.
"""
