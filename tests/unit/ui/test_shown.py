"""A conversation as HTML: what people and models write stays text."""

from llmtrain.ui.answers import Turn
from llmtrain.ui.page import shown


def test_texts_are_escaped_wherever_they_stand():
    page = shown([Turn("<b>?", "<script>alert(1)</script>", "failed", '<img src="http://elsewhere">')])
    assert page == (
        '<div role="log" aria-live="off" aria-label="Conversation">'
        '<div class="question">&lt;b&gt;?</div>'
        '<div class="answer">&lt;script&gt;alert(1)&lt;/script&gt;</div>'
        '<div class="problem" role="alert">Not whole: &lt;img src=&quot;http://elsewhere&quot;&gt;</div></div>'
    )


def test_only_an_answer_that_goes_on_is_marked_as_such():
    assert 'class="answer writing"' in shown([Turn("Why?")])
    assert 'class="answer' not in shown([Turn("Why?", end="stopped")])
    assert 'class="answer"' in shown([Turn("Why?", "So.", "whole")])


def test_only_the_last_problem_is_read_out():
    page = shown([Turn("One?", end="stopped"), Turn("Two?", end="stopped")])
    assert page.count('class="problem"') == 2
    assert page.count('role="alert"') == 1
    assert 'role="alert"' not in shown([Turn("One?", end="stopped"), Turn("Two?")])
