"""``python -m mla_patch`` and the command ``mla-patch``."""


def main() -> int:
    try:
        from mla_patch.cli import main as cli

        return cli.main()
    except KeyboardInterrupt:  # while it is still being imported
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
