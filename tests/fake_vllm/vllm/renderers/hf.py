def resolve_chat_template(*_, **__):
    return None
