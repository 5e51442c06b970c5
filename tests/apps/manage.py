"""A whole Django project in one file, with Django's own command line; its page says which process answers."""

from __future__ import annotations

import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, HttpResponse
from django.urls import path

settings.configure(DEBUG=True, ROOT_URLCONF=__name__, SECRET_KEY="for tests only", ALLOWED_HOSTS=["127.0.0.1"])


def hello(_: HttpRequest) -> HttpResponse:
    """Name the process."""
    return HttpResponse(f"hello from {os.getpid()}")


urlpatterns = [path("", hello)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
