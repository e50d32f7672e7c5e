package main

// The import command.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// importCmd is the import command with its arguments.
type importCmd struct {
	File      string `arg:"" help:"Import contracts from this file, in the format that export writes; - means standard input."`
	KeepGoing bool   `env:"-" help:"Skip invalid lines and import the others, also of an export that is cut off; exit with status 1 then."`
	database
}

// Run prints the faults of each invalid line, and stores the contracts of all lines, or of none if
// a line is invalid or an export is cut off; with --keep-going, it stores those of all valid lines.
func (c *importCmd) Run(ctx context.Context, a *app) (err error) {
	file, size, err := a.input(c.File)
	if err != nil {
		return err
	}
	defer file.Close()
	control, err := a.connect(c.DB, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	query := url.Values{"keep_going": {strconv.FormatBool(c.KeepGoing)}}
	content, _, err := control.send(ctx, http.MethodPost, "/contracts?"+query.Encode(), untilDone(ctx, file))
	if err != nil {
		return err
	}
	defer content.Close()
	events := jsontext.NewDecoder(content)
	bar := a.startProgress("reading", size, "")
	defer func() { bar.done() }()
	storing := false
	for {
		var e importEvent
		if err := json.UnmarshalDecode(events, &e); ctx.Err() != nil {
			return errors.New("the import was interrupted; repeat it to be sure of its result")
		} else if err != nil {
			return fmt.Errorf("read the result of the import: %w", explainTruncation(err))
		}
		for _, f := range e.Faults {
			bar.interrupt()
			_ = a.printf("line %d: %s\n", e.Line, f)
		}
		if e.Of > 0 && !storing {
			storing = true
			bar.done()
			bar = a.startProgress("storing", e.Of, "contracts")
		}
		bar.add(e.Read + e.Stored)
		switch {
		case e.Problem != "":
			return errors.New(e.Problem)
		case e.End == nil:
		case e.End.Bad > 0 && !c.KeepGoing:
			return fmt.Errorf("nothing was imported: %s out of %d; correct the input, or use --keep-going to import the valid lines", counted(e.End.Bad, "invalid line"), e.End.Lines)
		default:
			bar.done()
			fmt.Fprintf(a.stdout, "imported %s\n", counted(e.End.Imported, "contract"))
			var missing []string
			if e.End.Bad > 0 {
				missing = append(missing, fmt.Sprintf("skipped %s out of %d", counted(e.End.Bad, "invalid line"), e.End.Lines))
			}
			if e.End.CutOff {
				missing = append(missing, cutOff)
			}
			if missing != nil {
				return errors.New(strings.Join(missing, "; "))
			}
			return nil
		}
	}
}
