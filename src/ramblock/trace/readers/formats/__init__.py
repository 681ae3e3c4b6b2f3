# SPDX-License-Identifier: Apache-2.0
"""The formats: a module is a format, and its name is what ``--format`` takes."""
